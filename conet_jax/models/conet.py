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
from conet_jax.models import diagnostics, history, towers
from conet_jax.models.base import Batch, Hyper, Model, Params, Sizes, cross_entropies
from conet_jax.models.towers import Tower, merge

Pair = tuple[Any, Any]  # of the target, of the source
OTHER = {"target": "source", "source": "target"}


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
        return upper(self, targets, sources, crossed)

    def transition(
        self, level: int, targets: list[Any], sources: list[Any], crossed: Any = 1.0
    ) -> Pair:
        """Both layers l + 1 before the rectifier (Eq. 3), from the activations a^0 … a^l."""
        if level < self.cross_layers and not (self.cross_skip or self.is_initializing()):
            return self.one_product(level, targets[level], sources[level], crossed)
        return (
            self.target.W[level](targets[level]) + crossed * self.delta("target", level, sources),
            self.source.W[level](sources[level]) + crossed * self.delta("source", level, targets),
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
        """``transition`` as one product, ``[a_t, a_s] [[W_t, H_s], [H_t, W_s]] + [b_t, b_s]``.

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
        both = jnp.concatenate([target, source], axis=-1).astype(self.activation_dtype(target))
        both = both @ block.astype(both.dtype)
        both = both + jnp.broadcast_to(bias.astype(both.dtype), both.shape)
        return tuple(jnp.split(both, [self.layers[level + 1]], axis=-1))

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
    return two_towers(options, options.module)


def two_towers(options: Any, module: nn.Module) -> Model:
    """Returns the model of a module of two towers that share users, such as ``CoNet``."""
    return Model(
        domains=("target", "source"),
        pairing=options.pairing,
        inference=options.inference,
        init=partial(init, options=options, module=module),
        lookups=partial(lookups, options=options),
        losses=partial(example_losses, options=options, module=module),
        penalty=penalty,
        project=partial(project, options=options, module=module),
        scores=partial(scores, options=options, module=module),
        source_face=tuple(
            partial(face, options=options, module=module, domain="source")
            for face in (project, scores)
        ),
        shared_users=options.cross_layers > 0,
        diagnostics=partial(diagnose, options=options, module=module, uncrossed=uncrossed),
        l1_mask=crossing,
        uncrossed=uncrossed if options.cross_layers else None,
    )


def init(key: jax.Array, sizes: Sizes, options: Any, module: nn.Module) -> Params:
    """Initialises tables, N(0, 0.01^2), and towers; embeddings are half as wide as layer 0."""
    keys = jax.random.split(key, 4)
    dim = options.layers[0] // 2
    tables = {
        "user": towers.gaussian(keys[0], (sizes.users, dim)),
        "target_item": towers.gaussian(keys[1], (sizes.target_items, dim)),
        "source_item": towers.gaussian(keys[2], (sizes.source_items, dim)),
    }
    merged = jnp.zeros((1, 2 * dim))
    return Params(tables, module.init(keys[3], merged, merged)["params"])


def lookups(batch: Batch, options: Any) -> dict[str, jax.Array]:
    """Returns {"user": int32[k, n], "target_item": int32[n], "source_item": int32[n]}.

    ``user`` has the target's users and, unless the pairs share their user, the source's.
    """
    users = [batch.target.users]
    if options.pairing != "same_user":
        users.append(batch.source.users)
    items = {"target_item": batch.target.items, "source_item": batch.source.items}
    return {"user": jnp.stack(users), **items}


def inputs(
    rows: dict[str, jax.Array], batch: Batch, rate: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns x_ui and x_vj of a batch, f32[n, p] each; ``rate`` None is no dropout."""
    users = rows["user"]
    merged = merge(users[0], rows["target_item"]), merge(users[-1], rows["source_item"])
    if rate is None:
        return merged
    keys = jax.random.split(batch.key)
    return tuple(towers.dropout(key, x, rate) for key, x in zip(keys, merged, strict=True))


def batch_logits(
    dense: Any, rows: dict[str, jax.Array], batch: Batch, rate: Any, module: nn.Module
) -> dict[str, jax.Array]:
    """Returns the logits f32[n] of a batch's examples by domain."""
    both = module.apply({"params": dense}, *inputs(rows, batch, rate), batch.cross)
    return dict(zip(("target", "source"), both, strict=True))


def example_losses(
    dense: Any,
    rows: dict[str, jax.Array],
    batch: Batch,
    hyper: Hyper,
    options: Any,
    module: nn.Module,
) -> dict[str, jax.Array]:
    """Returns the loss of each example by domain (Eq. 5)."""
    rate = hyper.dropout if options.dropout else None
    return cross_entropies(batch_logits(dense, rows, batch, rate, module), batch)


def penalty(dense: Any, hyper: Hyper) -> jax.Array:
    """Returns l2 / 2 times the squared norm of what crosses (footnote 11)."""
    crosses = zip(jax.tree.leaves(dense), jax.tree.leaves(crossing(dense)), strict=True)
    return hyper.l2 / 2 * sum(jnp.sum(jnp.square(h)) for h, is_h in crosses if is_h)


def crossing(dense: Any) -> Any:
    """Returns the pytree of bools that is True on the H^l (on U and V if low-rank)."""
    return {
        name: jax.tree.map(lambda _, name=name: name.startswith("H_"), part)
        for name, part in dense.items()
    }


def uncrossed(dense: Any) -> Any:
    """Returns the dense parameters with every H^l at zero: two separate towers."""
    return jax.tree.map(lambda h, is_h: jnp.zeros_like(h) if is_h else h, dense, crossing(dense))


def project(
    params: Params, interactions: Any, options: Any, module: nn.Module, domain: str = "target"
) -> dict[str, jax.Array]:
    """Sends each table through the first transition once: Eq. 3 is linear in [user, item].

    Args:
      params: settled parameters.
      interactions: training interactions by domain; those of the other domain are read under
        ``inference: cross``: its tower gets [p_u, mean of the user's items there].
      options: structure.
      module: the towers.
      domain: whose items are to be scored.

    Returns:
      Under "target" see ``towers.project_tower``. Under "cross" ``user`` f32[users, r] and ``item``
      f32[items, r], whose sum is the first pre-activation of both towers, the target's before the
      source's; ``dense``. Where connections skip layers the input is needed above, too: ``user``
      and ``item`` are then embeddings and ``user_history`` is that mean.
    """
    tables, dense = params
    user, item = tables["user"], tables[f"{domain}_item"]
    if options.inference == "target":
        return towers.project_tower(dense[domain], user, item)
    other = OTHER[domain]
    pairs = interactions[other]
    means = history.mean_of_all(pairs.items, pairs.users, tables[f"{other}_item"], user.shape[0])
    if getattr(options, "cross_skip", 0):
        return {"user": user, "user_history": means, "item": item, "dense": dense}
    none = jnp.zeros_like(user)
    by_user = {domain: merge(user, none), other: merge(user, means)}
    none = jnp.zeros_like(item)
    by_item = {domain: merge(none, item), other: merge(none, none)}
    return {
        "user": first_layer(module, dense, by_user["target"], by_user["source"]),
        "item": first_layer(module, without_bias(dense), by_item["target"], by_item["source"]),
        "dense": dense,
    }


def first_layer(module: nn.Module, dense: Any, target: jax.Array, source: jax.Array) -> jax.Array:
    """Returns the first pre-activations of both towers side by side, f32[..., r]."""
    both = module.apply({"params": dense}, 0, [target], [source], method=type(module).transition)
    return jnp.concatenate(both, axis=-1)


def without_bias(dense: Any) -> Any:
    """Drops the first biases: they ride on the user's part of a pre-activation, once."""

    def strip(tower: Any) -> Any:
        layer = tower["W_0"]
        return {**tower, "W_0": {**layer, "bias": jnp.zeros_like(layer["bias"])}}

    return {**dense, "target": strip(dense["target"]), "source": strip(dense["source"])}


def scores(
    projected: dict[str, Any],
    users: jax.Array,
    items: jax.Array,
    options: Any,
    module: nn.Module,
    domain: str = "target",
) -> jax.Array:
    """Logits of each user for its items: the forward pass, from layer 1 on where it can.

    Args:
      projected: from ``project``.
      users: int32[n].
      items: int32[n, c].
      options: structure.
      module: the towers.
      domain: that of the items.

    Returns:
      f32[n, c].
    """
    at = ("target", "source").index(domain)
    if options.inference == "target":
        layers = (options.layers, getattr(options, "source_layers", ()) or options.layers)[at]
        return towers.score_tower(Tower(layers, dtype=options.dtype), projected, users, items)
    variables = {"params": projected["dense"]}
    if "user_history" in projected:
        item = projected["item"][items]

        def beside(table: jax.Array) -> jax.Array:
            return jnp.broadcast_to(table[users][:, None, :], item.shape)

        user, means = beside(projected["user"]), beside(projected["user_history"])
        inputs = [merge(user, item), merge(user, means)]
        return module.apply(variables, *(inputs if domain == "target" else inputs[::-1]))[at]
    both = nn.relu(projected["user"][users][:, None, :] + projected["item"][items])
    target, source = jnp.split(both, [options.layers[1]], axis=-1)
    # The input, layer 0, is used up.
    known = [None, target], [None, source]
    return module.apply(variables, *known, method=type(module).upper)[at]


def diagnose(
    dense: Any,
    rows: dict[str, jax.Array],
    batch: Batch,
    options: Any,
    module: nn.Module,
    uncrossed: Any,
) -> dict[str, jax.Array]:
    """Returns ``diagnostics.of_towers`` and ``diagnostics.of_crossing`` of a batch."""
    logits = batch_logits(dense, rows, batch, None, module)
    given = dense, uncrossed(dense), *inputs(rows, batch, None)
    return diagnostics.of_towers(logits, batch) | diagnostics.of_crossing(
        module, *given, cross_layers=options.cross_layers
    )
