r"""Phones from sport, leave-one-out of all pairs with given negatives: 4,998 users.

python launch/prepare.py --target=phone --source=sport --out=data/phone_sport
python launch/train.py --config=configs/phone_sport.py:recipe

launch/table2.py prints the published figures beside ours.
"""

from ml_collections import ConfigDict

from conet_jax.config import default_config
from conet_jax.published import CVGAE, Figure

PUBLISHED = tuple(
    Figure(*row, CVGAE)
    for row in (
        ("BPR", 0.4010, 0.2658, 0.2237),
        ("LightGCN", 0.4870, 0.3185, 0.2662),
        ("CoNet", 0.4336, 0.2695, 0.2187),
        ("CoNet with lasso", 0.4632, 0.2883, 0.2341),
        ("CrossAug", 0.4676, 0.3192, 0.2728),
        ("the best there", 0.5650, 0.3628, 0.3006),
    )
)


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant (``conet_jax/variants.py`` has them)."""
    config = default_config(variant)
    config.name = "phone_sport"
    config.data.dir = "data/phone_sport"
    config.data.prepare = "python launch/prepare.py --target=phone --source=sport"
    return config
