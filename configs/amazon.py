"""The paper's Amazon set: books from movies & TV, ratings of 4 and 5.

Table 1 counts 80,763 users, 93,799 books with 1,323,101 pairs and 35,896 movies with 963,373; the
paper does not state its filter. Fetch and prepare the two rating files (a 5-core), and train

    python launch/prepare.py --download=amazon --out=data/amazon
    python launch/train.py --config=configs/amazon.py
"""

from ml_collections import ConfigDict

from conet_jax.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant (``conet_jax/variants.py`` has them)."""
    config = default_config(variant)
    config.name = "amazon"
    if config.model.startswith("recipe"):
        config.layers = (64, 32, 16, 8)  # half the memory of the tables
    config.data.dir = "data/amazon"
    config.data.prepare = "python launch/prepare.py --download=amazon"
    return config
