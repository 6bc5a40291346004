r"""Cell phones from electronics, given as NCF triples: 3,325 users.

Twins, one product listed under both categories, leak held-out pairs: drop them from the source.

    python launch/prepare.py --target=cell --source=electronics --drop_twins \
        --out=data/cell_electronics
    python launch/train.py --config=configs/cell_electronics.py:recipe
"""

from ml_collections import ConfigDict

from conet_jax.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant (``conet_jax/variants.py`` has them)."""
    config = default_config(variant)
    config.name = "cell_electronics"
    config.data.dir = "data/cell_electronics"
    config.data.prepare = "python launch/prepare.py --target=cell --source=electronics --drop_twins"
    return config
