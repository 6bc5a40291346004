r"""Sport from phones, leave-one-out of all pairs with given negatives: 4,998 users.

python launch/prepare.py --target=sport --source=phone --out=data/sport_phone
python launch/train.py --config=configs/sport_phone.py:recipe

launch/table2.py prints the published figures beside ours.
"""

from ml_collections import ConfigDict

from conet_jax.config import default_config
from conet_jax.published import CVGAE, Figure

PUBLISHED = tuple(
    Figure(*row, CVGAE)
    for row in (
        ("BPR", 0.3235, 0.2220, 0.1903),
        ("LightGCN", 0.3886, 0.2526, 0.2106),
        ("CoNet", 0.3507, 0.2140, 0.1717),
        ("CoNet with lasso", 0.3595, 0.2131, 0.1681),
        ("CrossAug", 0.3976, 0.2770, 0.2391),
        ("the best there", 0.5424, 0.3342, 0.2707),
    )
)


def get_config(variant: str = "") -> ConfigDict:
    """Returns the config of a variant (``conet_jax/variants.py`` has them)."""
    config = default_config(variant)
    config.name = "sport_phone"
    config.data.dir = "data/sport_phone"
    config.data.prepare = "python launch/prepare.py --target=sport --source=phone"
    return config
