"""The paper's Mobile set: apps from news. The data is private: bring data of that shape.

Table 1 counts 23,111 users, 14,348 apps with 1,164,394 installations and 29,921 news with 617,146
readings; footnote 4 announces a release that never came. Prepare your own with

    python launch/prepare.py --target=apps.csv --source=news.csv --out=data/mobile
"""

from ml_collections import ConfigDict

from conet_jax.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant (``conet_jax/variants.py`` has them)."""
    config = default_config(variant)
    config.name = "mobile"
    if config.model.startswith("recipe"):
        config.layers = (64, 32, 16, 8)  # half the memory of the tables
    config.data.dir = "data/mobile"
    config.data.prepare = "python launch/prepare.py --target=apps.csv --source=news.csv"
    if config.model == "conet" and not config.variant.startswith("published"):
        config.target_weight = 0.8  # Sec. 3.3: best on Mobile
    return config
