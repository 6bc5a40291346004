r"""Douban books from music, ratings of 4 and 5: a core of 1,271 users.

python launch/prepare.py --target=books.dat --source=music.dat \
        --min_item_users=3 --min_user_items=2 --out=data/douban
python launch/train.py --config=configs/douban.py:recipe
"""

from ml_collections import ConfigDict

from conet_jax.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant (``conet_jax/variants.py`` has them)."""
    config = default_config(variant)
    config.name = "douban"
    config.data.dir = "data/douban"
    config.data.prepare = (
        "python launch/prepare.py --target=books.dat --source=music.dat "
        "--min_item_users=3 --min_user_items=2"
    )
    return config
