"""Cross-stitch network (Misra et al. 2016): two towers that mix their activations by scalars.

Before a crossed transition the target's activations become ``a_tt a_t + a_ts a_s`` and the
source's ``a_st a_t + a_ss a_s`` (the paper's Sec. 2.3, with a scalar for each of the four), so both
live in one space, and all widths are equal: towers such as [64] * 4.

That is a CoNet whose H^l is a multiple of the other tower's W^l, and so it is built.
"""

from functools import lru_cache
from typing import NamedTuple

from conet_jax.models import conet
from conet_jax.models.base import Model


class Options(NamedTuple):
    """Structure, see ``conet.Options``; ``cross_layers`` counts the units from the lowest."""

    layers: tuple[int, ...] = (64, 64, 64, 64)
    cross_layers: int = 3
    inner_product: bool = False
    inner_weight: float = 1.0
    output_bias: float = 0.0
    output_scale: float = 1.0
    initializer: str = "he"
    dropout: bool = False
    pairing: str = "same_user"
    inference: str = "cross"
    dtype: str = "float32"


@lru_cache
def build(options: Options) -> Model:
    """Returns the network as a ``Model`` of pure functions."""
    return conet.build(conet.Options(**options._asdict(), cross_unit="stitch"))
