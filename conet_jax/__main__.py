"""``python -m conet_jax train …`` does what ``conet train …`` does."""

from conet_jax.console import main

if __name__ == "__main__":
    main()
