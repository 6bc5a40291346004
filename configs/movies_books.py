r"""Books from movies, the paper's pair in small: a core of 5,797 users.

Make the data with

    python launch/prepare.py --target=books.csv --source=movies.csv \
        --min_item_users=3 --min_user_items=2 --out=data/movies_books
"""

from ml_collections import ConfigDict

from conet_jax.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant (see ``conet_jax.config.default_config``)."""
    config = default_config(variant)
    config.name = "movies_books"
    if config.model == "ials" or config.warm_start in ("ials", "crossfit"):
        # Chosen on validation for this pair (README, "The search").
        config.ials_regularization = 600.0
        config.ials_alpha = 250.0
        config.ials_source_weight = 0.4
    config.data.dir = "data/movies_books"
    config.data.prepare = (
        "python launch/prepare.py --target=books.csv --source=movies.csv "
        "--min_item_users=3 --min_user_items=2"
    )
    return config
