"""Cross-stitch network (Misra et al. 2016): two towers that mix their activations by scalars.

Before a crossed transition the target's activations become ``a_tt a_t + a_ts a_s`` and the
source's ``a_st a_t + a_ss a_s`` (the paper's Sec. 2.3, with a scalar for each of the four), so both
live in one space, and all widths are equal: towers such as [64] * 4.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from conet_jax.errors import InputError
from conet_jax.models import conet, two_towers
from conet_jax.models.base import Model
from conet_jax.models.towers import Tower

# [[a_tt, a_ts], [a_st, a_ss]]; Misra et al. 2016, Sec. 5.1, find 0.9 for the own task's best.
START = ((0.9, 0.1), (0.1, 0.9))


class CrossStitch(nn.Module):
    """Two towers and their cross-stitch units; the interface is ``conet.CoNet``'s."""

    layers: tuple[int, ...]
    cross_layers: int
    initializer: str = "he"
    dtype: str = "float32"

    def setup(self) -> None:
        """Makes the towers and a unit for each crossed transition."""
        self.target = Tower(self.layers, self.initializer, dtype=self.dtype)
        self.source = Tower(self.layers, self.initializer, dtype=self.dtype)
        self.units = [
            self.param(f"unit_{level}", lambda _: jnp.array(START))
            for level in range(self.cross_layers)
        ]

    def __call__(self, target: jax.Array, source: jax.Array, crossed: Any = 1.0) -> conet.Pair:
        """Both towers from the merged embeddings f32[..., p] to the logits f32[...]."""
        return self.upper([target], [source], crossed)

    def upper(self, targets: list[Any], sources: list[Any], crossed: Any = 1.0) -> conet.Pair:
        """``__call__`` from the activations of the layers that are known on."""
        return conet.upper(self, targets, sources, crossed)

    def transition(
        self, level: int, targets: list[Any], sources: list[Any], crossed: Any = 1.0
    ) -> conet.Pair:
        """Both layers l + 1 before the rectifier; with ``crossed`` 0 of two plain towers."""
        target, source = targets[level], sources[level]
        if level < self.cross_layers:
            unit = jnp.eye(2) + crossed * (self.units[level] - jnp.eye(2))
            unit = unit.astype(target.dtype)
            target, source = (
                unit[0, 0] * target + unit[0, 1] * source,
                unit[1, 0] * target + unit[1, 1] * source,
            )
        return self.target.W[level](target), self.source.W[level](source)


class Options(NamedTuple):
    """Structure, see ``conet.Options``; ``cross_layers`` counts the units from the lowest."""

    layers: tuple[int, ...] = (64, 64, 64, 64)
    cross_layers: int = 3
    initializer: str = "he"
    dropout: bool = False
    pairing: str = "same_user"
    inference: str = "cross"
    dtype: str = "float32"


def check(config: Any) -> None:
    """Raises ``InputError`` where fields of the config do not fit a cross-stitch network."""
    conet.check(config)
    if len(set(config.layers)) > 1 or config.source_layers:
        raise InputError(
            f"config.layers is {tuple(config.layers)!r}: a cross-stitch network mixes activations "
            "of one space, so expected equal widths of both towers, such as (64, 64, 64, 64)"
        )


@lru_cache
def build(options: Options) -> Model:
    """Returns the network as a ``Model`` of pure functions."""
    module = CrossStitch(options.layers, options.cross_layers, options.initializer, options.dtype)
    return two_towers.model_of(options, module)._replace(
        penalty=None,
        diagnostics=partial(
            two_towers.diagnose, options=options, module=module, uncrossed=uncrossed
        ),
        l1_mask=lambda dense: jax.tree.map(lambda _: False, dense),
        uncrossed=uncrossed if options.cross_layers else None,
    )


def uncrossed(dense: Any) -> Any:
    """Returns the dense parameters with nothing from the other tower; the own share stays."""
    return {
        name: jnp.diag(jnp.diag(part)) if name.startswith("unit_") else part
        for name, part in dense.items()
    }
