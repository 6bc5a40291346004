r"""Cell phones from electronics, given as NCF triples: 3,325 users.

Twins, one product listed under both categories, leak held-out pairs: drop them from the source.
Make the data with

    python launch/prepare.py --target=cell --source=electronics --drop_twins \
        --out=data/cell_electronics
"""

from ml_collections import ConfigDict

from conet_jax.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant (see ``conet_jax.config.default_config``)."""
    config = default_config(variant)
    config.name = "cell_electronics"
    if config.model == "ials" or config.warm_start in ("ials", "crossfit"):
        # Chosen on validation for this pair, by iALS's own search (README, "The search").
        config.ials_regularization = 889.0
        config.ials_alpha = 262.0
        config.ials_source_weight = 0.257
    config.data.dir = "data/cell_electronics"
    config.data.prepare = "python launch/prepare.py --target=cell --source=electronics --drop_twins"
    return config
