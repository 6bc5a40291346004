"""Any prepared data set: nothing is changed of the defaults.

    python launch/prepare.py --target=FILE --source=FILE --out=data/mine
    python launch/train.py --config=configs/default.py:recipe --data=data/mine

``--data=DIR`` stands for ``--config.data.dir=DIR``, and names the run after the folder.
"""

from ml_collections import ConfigDict

from conet_jax.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant (``conet_jax/variants.py`` has them)."""
    return default_config(variant)
