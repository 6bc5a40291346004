"""CoNet as the paper has it (Eqs. 1-4): two towers exchange hidden activations through the H^l.

Tables: ``user`` (P, shared by the domains), ``target_item`` and ``source_item`` (Q of each). Dense
parameters are those of the module ``CoNet``. Eq. 5 is in ``losses``, Eqs. 7 and 8 in ``train.step``
and ``optimizers``.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from conet_jax.errors import InputError
from conet_jax.models import diagnostics, towers, two_towers
from conet_jax.models.base import Model
from conet_jax.models.towers import Tower

Pair = tuple[Any, Any]  # of the target, of the source


class CrossConnection(nn.Module):
    """H^l of Eq. 4: what the activations of one tower add to the next layer of the other.

    Attributes:
      width: of that layer.
      rank: of H^l = U^T V (footnote 3); 0 is a full matrix.
      dtype: as in ``Tower``.
    """

    width: int
    rank: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, a: jax.Array) -> jax.Array:
        """Returns H^l a, f32[..., p] -> f32[..., width]. Entries of H^l start as N(0, 0.01^2)."""
        std = towers.GAUSSIAN_STD
        linear = partial(nn.Dense, use_bias=False, **towers.precision(self.dtype))
        if not self.rank:
            return linear(self.width, kernel_init=nn.initializers.normal(std), name="H")(a)
        # U^T V has entries of that deviation at any rank, as the full matrix has.
        normal = nn.initializers.normal((std / self.rank**0.5) ** 0.5)
        a = linear(self.rank, kernel_init=normal, name="V")(a)
        return linear(self.width, kernel_init=normal, name="U")(a)


class CoNet(nn.Module):
    """Two towers and their cross connections (Fig. 1).

    Attributes:
      layers: widths of the target tower; the first is the merged embedding.
      source_layers: of the source tower; () is as the target's. As many.
      cross_layers: crossed transitions, counted from the lowest; 0 is no transfer.
      cross_per_direction: an H^l for each direction instead of a shared one (footnote 1). Towers of
        different widths have one for each in any case.
      cross_skip: layers that a connection may skip (footnote 1): with 1, a^l goes to layer l + 1
        and, through a matrix of its own, to layer l + 2.
      cross_rank: see ``CrossConnection``.
      initializer: of the towers.
      output_scale: see ``Tower``.
      output_bias: see ``Tower``.
      dtype: see ``Tower``.
    """

    layers: tuple[int, ...] = (64, 32, 16, 8)
    source_layers: tuple[int, ...] = ()
    cross_layers: int = 3
    cross_per_direction: bool = False
    cross_skip: int = 0
    cross_rank: int = 0
    initializer: str = "he"
    output_scale: float = 1.0
    output_bias: float | None = None
    dtype: str = "float32"

    def setup(self) -> None:
        """Makes the towers W^l and the H^l: ``H_l_s`` skips s layers."""
        output = self.output_scale, self.output_bias
        self.target = Tower(self.layers, self.initializer, *output, self.dtype)
        self.source = Tower(
            self.source_layers or self.layers, self.initializer, *output, self.dtype
        )

        def connections(layers: tuple[int, ...]) -> list[list[CrossConnection]]:
            widths = layers[1 : 1 + self.cross_layers]
            return [
                [
                    CrossConnection(width, self.cross_rank, self.dtype)
                    for _ in range(1 + min(level, self.cross_skip))
                ]
                for level, width in enumerate(widths)
            ]

        if self.cross_per_direction or self.source.layers != self.layers:
            self.H_to_target = connections(self.layers)
            self.H_to_source = connections(self.source.layers)
        else:
            self.H = connections(self.layers)  # footnote 1: the same both ways

    def __call__(self, target: jax.Array, source: jax.Array, crossed: Any = 1.0) -> Pair:
        """Both towers from the merged embeddings to the logits (Eqs. 1-4).

        Args:
          target: f32[..., p], x_ui = [p_u, q_i] of the target domain.
          source: f32[..., p], x_vj = [p_v, q_j] of the source domain.
          crossed: factor on what crosses; 0 is two separate towers.

        Returns:
          (target logits, source logits), f32[...] each.
        """
        return self.upper([target], [source], crossed)

    def upper(self, targets: list[Any], sources: list[Any], crossed: Any = 1.0) -> Pair:
        """``__call__`` from the activations a^0, a^1, … of the layers that are known on."""
        level = len(targets) - 1
        if level < self.cross_layers and not (self.cross_skip or self.is_initializing()):
            both = jnp.concatenate([targets[-1], sources[-1]], axis=-1)
            for crossing in range(level, self.cross_layers):
                both = nn.relu(self.joined(crossing, both, crossed))
            target, source = jnp.split(both, [self.layers[self.cross_layers]], axis=-1)
            below = [None] * self.cross_layers
            targets, sources = [*below, target], [*below, source]
        return upper(self, targets, sources, crossed)

    def transition(
        self, level: int, targets: list[Any], sources: list[Any], crossed: Any = 1.0
    ) -> Pair:
        """Both layers l + 1 before the rectifier (Eq. 3), from the activations a^0 … a^l."""
        if level < self.cross_layers and not (self.cross_skip or self.is_initializing()):
            return self.one_product(level, targets[level], sources[level], crossed)
        W_target, W_source = self.target.W[level], self.source.W[level]
        to_target = crossed * self.delta("target", level, sources)
        to_source = crossed * self.delta("source", level, targets)
        return (
            W_target(targets[level]) + to_target,  # Eq. 3a
            W_source(sources[level]) + to_source,  # Eq. 3b
        )

    def delta(self, to: str, level: int, others: list[Any]) -> Any:
        """H^l a^l of the other tower (Eq. 4), 0 above the crossed layers."""
        H = self.connections(to)
        if level >= len(H):
            return 0.0
        return sum(h(others[level - skipped]) for skipped, h in enumerate(H[level]))

    def connections(self, to: str) -> list[list[CrossConnection]]:
        """The H^l to a tower, by level and by the layers that they skip."""
        if hasattr(self, "H"):
            return self.H
        return self.H_to_target if to == "target" else self.H_to_source

    def one_product(self, level: int, target: Any, source: Any, crossed: Any) -> Pair:
        """``transition`` as one product, see ``joined``."""
        both = self.joined(level, jnp.concatenate([target, source], axis=-1), crossed)
        return tuple(jnp.split(both, [self.layers[level + 1]], axis=-1))

    def joined(self, level: int, both: jax.Array, crossed: Any) -> jax.Array:
        """Eqs. 3a and 3b, ``[a_t, a_s] [[W_t, H_s], [H_t, W_s]] + [b_t, b_s]``, side by side.

        Four products, as the paper writes them, take a step of the recipe a fifth longer.
        """
        target_layer, source_layer = (
            tower.W[level].variables["params"] for tower in (self.target, self.source)
        )
        to_target, to_source = (
            crossed * diagnostics.matrix(self.connections(to)[level][0].variables["params"])
            for to in ("target", "source")
        )
        block = jnp.block(
            [[target_layer["kernel"], to_source], [to_target, source_layer["kernel"]]]
        )
        bias = jnp.concatenate([target_layer["bias"], source_layer["bias"]])
        both = both.astype(self.activation_dtype(both))
        both = both @ block.astype(both.dtype)
        return both + jnp.broadcast_to(bias.astype(both.dtype), both.shape)

    def activation_dtype(self, x: jax.Array) -> Any:
        """The dtype of the hidden activations."""
        return x.dtype if self.dtype == "float32" else self.dtype


def upper(module: nn.Module, targets: list[Any], sources: list[Any], crossed: Any) -> Pair:
    """Goes up two towers with ``transition`` from the activations that are known."""
    targets, sources = list(targets), list(sources)
    for level in range(len(targets) - 1, len(module.layers) - 1):
        target, source = module.transition(level, targets, sources, crossed)
        targets.append(nn.relu(target))
        sources.append(nn.relu(source))
    return module.target.output(targets[-1]), module.source.output(sources[-1])


class Options(NamedTuple):
    """Structure of a CoNet, what changes shapes or the program. See ``CoNet`` for the others.

    Attributes:
      dropout: whether ``Hyper.dropout`` is applied to the merged embeddings in training.
      pairing: "random" or "same_user".
      inference: "target" (tower alone) or "cross" (with the user's source history).
    """

    layers: tuple[int, ...] = (64, 32, 16, 8)
    source_layers: tuple[int, ...] = ()
    cross_layers: int = 3
    cross_per_direction: bool = False
    cross_skip: int = 0
    cross_rank: int = 0
    initializer: str = "he"
    dropout: bool = False
    pairing: str = "same_user"
    inference: str = "cross"
    dtype: str = "float32"

    @property
    def module(self) -> CoNet:
        """The module of this structure."""
        fields = self._asdict()
        return CoNet(**{name: fields[name] for name in fields.keys() & CoNet.__annotations__})


def check(config: Any) -> None:
    """Raises ``InputError`` where fields of the config do not fit a CoNet."""
    layers, source = tuple(config.layers), tuple(config.source_layers)
    if config.cross_layers > len(layers) - 1:
        raise InputError(
            f"config.cross_layers is {config.cross_layers}: layers {layers} have only "
            f"{len(layers) - 1} transitions to cross"
        )
    if source and (len(source) != len(layers) or source[0] != layers[0]):
        raise InputError(
            f"config.source_layers is {source}: expected as many widths as config.layers, "
            f"{layers}, and the same first, since the users' embeddings are shared"
        )


@lru_cache
def build(options: Options) -> Model:
    """Returns CoNet as a ``Model`` of pure functions, the same object for the same options."""
    return two_towers.model_of(options, options.module)
