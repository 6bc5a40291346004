r"""Books from movies, the paper's pair in small: a core of 5,797 users.

python launch/prepare.py --target=books.csv --source=movies.csv \
        --min_item_users=3 --min_user_items=2 --out=data/movies_books
python launch/train.py --config=configs/movies_books.py:recipe
"""

from ml_collections import ConfigDict

from conet_jax.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant (``conet_jax/variants.py`` has them)."""
    config = default_config(variant)
    config.name = "movies_books"
    config.data.dir = "data/movies_books"
    config.data.prepare = (
        "python launch/prepare.py --target=books.csv --source=movies.csv "
        "--min_item_users=3 --min_user_items=2"
    )
    return config
