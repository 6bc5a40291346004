"""What a model is: a few pure functions over embedding rows and dense parameters.

Tables are large and touched sparsely, dense parameters small and touched in every step; a model
keeps the two apart and does not know how either is updated. It gives the loss of each example; how
examples are weighed and the domains' losses joined (Eq. 7) is the step's (``train.step``).

``one_domain`` makes a model of a ``flax.linen`` module that maps rows of a user and an item to a
logit: a first version of a new model is that module.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from conet_jax import losses

Tables = Mapping[str, jax.Array]


class Sizes(NamedTuple):
    """Rows of the embedding tables: users and the items of each domain."""

    users: int
    target_items: int
    source_items: int


class Params(NamedTuple):
    """Parameters of a model: ``tables`` {name: f32[rows, dim]} and a ``dense`` pytree."""

    tables: dict[str, jax.Array]
    dense: Any


class Examples(NamedTuple):
    """Examples of one domain (Eq. 5): observed pairs and sampled negatives, all of shape [n].

    ``weights`` is 1, or an observed pair's own where the data have weights, and 0 for padding and
    where a domain sits out a step. Under ``pairing: pairs``
    every example is an observed pair and ``negatives`` holds a sampled item for each, else None.
    ``folds`` is that of the observed pair that an example is or was made for, None without folds.
    """

    users: jax.Array
    items: jax.Array
    labels: jax.Array
    weights: jax.Array
    negatives: jax.Array | None = None
    folds: jax.Array | None = None


class History(NamedTuple):
    """A user's training items in the other domain: ``items`` i32[n, length], ``mask`` f32."""

    items: jax.Array
    mask: jax.Array


class Batch(NamedTuple):
    """One step's examples, paired by position.

    Attributes:
      target: examples of the target domain.
      source: examples of the source domain; the users are those of ``target`` under
        ``pairing: same_user``. None for a model of the target alone, and when pairs are scored.
      source_history: what ``target.users`` have in the source (``pairing: context``), else None.
      cross: f32[], 1, or 0 in a step of one domain alone, where nothing crosses.
      key: PRNG key of the step, for dropout; None when pairs are scored.
      graph: what ``Model.graph`` makes of all training interactions, else None.
    """

    target: Examples
    source: Examples | None
    source_history: History | None
    cross: jax.Array
    key: jax.Array | None
    graph: Any = None


class Hyper(NamedTuple):
    """Real-valued hyper-parameters, traced: a population of runs is one ``vmap`` over these."""

    learning_rate: jax.Array
    target_weight: jax.Array
    l1: jax.Array
    dropout: jax.Array
    l2: jax.Array | float = 0.0
    negative_weight: jax.Array | float = 1.0


class Model(NamedTuple):
    """A recommender that is trained by gradients, as pure functions.

    Attributes:
      domains: the domains it is trained on, ("target",) or ("target", "source").
      pairing: how examples of the two domains meet, see ``sampling``; with one domain None,
        "pairs" or "context".
      init: (key, Sizes) -> Params.
      lookups: Batch -> {table: int32[...]}, the ids whose rows a step reads.
      losses: (dense, rows, batch, hyper) -> {domain: f32[n]}, the loss of each example in nats
        (Eq. 5), not weighed. ``rows`` has the shapes of ``lookups`` with the embedding dimension
        appended.
      project: (params, interactions by domain) -> projected tables for ``scores``, a dict whose
        ``item`` has a row for each target item: what can be computed once for a user or an item.
        Entries named user… and item… have a row for each, in the order of the tables' rows; all
        others are dense.
      scores: (projected, users int32[n], items int32[n, c]) -> logits f32[n, c].
      inference: "target" or "cross": whether scores read the user's training items in the source.
      linear: projected -> (f32[users, p], f32[items, p]), whose product is the part of the scores
        that is cheap, less what ``neighbours.apart`` takes out; None of a model without such.
      source_face: (project, scores) of the source domain's items, see ``facing``; None for a model
        that cannot score them.
      shared_users: whether it learns from the pairs of users of both domains alone, since others
        have nothing that could cross.
      weights: (rows, batch) -> {domain: f32[n]}, weights of the examples; None is those of the
        batch.
      penalties: (dense, rows, batch, hyper) -> {domain: f32[n]}, what an example's loss is
        penalised by.
      penalty: (dense, hyper) -> f32[], against the mean loss per example, where something crosses.
      diagnostics: (dense, rows, batch) -> {name: f32[]}, what crosses between the towers.
      l1_mask: dense -> pytree of bools, the parameters under the lasso (the H^l of Eq. 8).
      uncrossed: dense -> dense under which nothing crosses; None for a model without crossing.
      start: None, or (pairs by domain, sizes, seed, known, mesh) -> tables to start from, split
        over the devices of ``mesh``; ``known`` has of each table the rows that an earlier run
        knows, see ``run.earlier``.
      fixed_tables: whether the tables stay as they start, and the rest alone is trained.
      folds: parts of the training pairs, of which an example's is known to the model; 0 is none.
      copies: name of a table -> its rows for each user or item, beside each other.
      graph: None, or interactions by domain -> a pytree that ``losses`` finds in each batch, of a
        model whose every example depends on all training interactions; trained on one device.
      logits: whether scores are logits: their sigmoid is the probability that a pair is an observed
        one, among observed pairs and sampled negatives as in training. Else they only order.
    """

    domains: tuple[str, ...]
    pairing: str | None
    init: Callable[..., Params]
    lookups: Callable[[Batch], dict[str, jax.Array]]
    losses: Callable[..., dict[str, jax.Array]]
    project: Callable[..., Any]
    scores: Callable[..., jax.Array]
    inference: str = "target"
    linear: Callable[[Any], tuple[jax.Array, jax.Array]] | None = None
    source_face: tuple[Callable[..., Any], Callable[..., jax.Array]] | None = None
    shared_users: bool = False
    weights: Callable[..., dict[str, jax.Array]] | None = None
    penalties: Callable[..., dict[str, jax.Array]] | None = None
    penalty: Callable[..., jax.Array] | None = None
    diagnostics: Callable[..., dict[str, jax.Array]] = lambda dense, rows, batch: {}
    l1_mask: Callable[[Any], Any] = lambda dense: jax.tree.map(lambda _: False, dense)
    uncrossed: Callable[[Any], Any] | None = None
    start: Callable[..., dict[str, Any]] | None = None
    fixed_tables: bool = False
    folds: int = 0
    copies: Callable[[str], int] = lambda table: 1
    graph: Callable[..., Any] | None = None
    logits: bool = True
    closed_form: bool = False  # never: see ``FittedModel``


class FittedModel(NamedTuple):
    """A recommender that is fitted in passes over the data, as pure functions.

    Attributes:
      domains: those it is fitted on.
      init: (key, Sizes) -> Params.
      sweeper: (interactions by domain, Sizes) -> sweep, and sweep: Params -> Params is an epoch:
        one pass of alternating least squares, or the whole of a closed form.
      project: as in ``Model``.
      scores: as in ``Model``; they only order.
      inference: as in ``Model``.
      closed_form: whether the first sweep is the last.
      linear: as in ``Model``.
    """

    domains: tuple[str, ...]
    init: Callable[..., Params]
    sweeper: Callable[..., Callable[[Params], Params]]
    project: Callable[..., Any]
    scores: Callable[..., jax.Array]
    inference: str = "target"
    closed_form: bool = False
    linear: Callable[[Any], tuple[jax.Array, jax.Array]] | None = None
    # What a model that is trained by gradients can be and this cannot.
    pairing: None = None
    source_face: None = None
    shared_users: bool = False
    uncrossed: None = None
    start: None = None
    fixed_tables: bool = False
    copies: Callable[[str], int] = lambda table: 1
    graph: None = None
    logits: bool = False


def facing(model: Model | FittedModel, domain: str) -> Model | FittedModel | None:
    """Returns a model that scores the items of a domain, with the parameters of ``model``.

    None for the source of a model that cannot.
    """
    if domain == "target":
        return model
    if model.source_face is None:
        return None
    project, scores = model.source_face
    return model._replace(project=project, scores=scores, linear=None)


Logits = Callable[..., dict[str, jax.Array]]  # (dense, rows, batch, dropout rate or None)


def cross_entropies(logits: dict[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
    """Returns the cross-entropy of each example by domain (Eq. 5): {domain: f32[n]} in nats."""
    return {
        domain: losses.binary_cross_entropy(
            of_domain, getattr(batch, domain).labels, reduction="none"
        )
        for domain, of_domain in logits.items()
    }


def pair_lookups(batch: Batch) -> dict[str, jax.Array]:
    """Returns {"user": int32[n], "target_item": int32[n]}, what a model of one domain reads."""
    return {"user": batch.target.users, "target_item": batch.target.items}


def project_rows(params: Params, interactions: Any) -> dict[str, Any]:
    """Projects nothing: tables and dense parameters as they are, for ``score_pairs``."""
    del interactions
    tables = params.tables
    return {"user": tables["user"], "item": tables["target_item"], "dense": params.dense}


def score_pairs(
    logits: Logits, projected: dict[str, Any], users: jax.Array, items: jax.Array
) -> jax.Array:
    """Scores f32[n, c] of users int32[n] for items int32[n, c] by the forward pass itself.

    Args:
      logits: (dense, rows, batch, None) -> {"target": f32[n c]}.
      projected: from ``project_rows``.
      users: int32[n].
      items: int32[n, c].
    """
    each = jnp.repeat(users, items.shape[1]), items.reshape(-1)
    nothing = jnp.zeros(each[0].shape)
    batch = Batch(Examples(*each, nothing, nothing), None, None, jnp.ones(()), None)
    rows = {"user": projected["user"][each[0]], "target_item": projected["item"][each[1]]}
    return logits(projected["dense"], rows, batch, None)["target"].reshape(items.shape)


def one_domain(module: nn.Module, dim: int, *, std: float = 0.01) -> Model:
    """Returns the model of a module on the target domain: logits, losses and scores by its forward.

    Args:
      module: maps rows of users f32[n, dim] and items f32[n, dim] to logits f32[n].
      dim: columns of the tables ``user`` and ``target_item``, which start as N(0, std^2).
      std: the paper's is .01.

    Returns:
      A ``Model``, whose every function can be replaced by a quicker one (``_replace``).

    Example:
      >>> class Dot(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, user, item):
      ...         return nn.Dense(1)(user * item)[:, 0]
      >>> model = one_domain(Dot(), dim=4)
      >>> params = model.init(jax.random.key(0), Sizes(3, 5, 0))
      >>> projected = model.project(params, None)
      >>> print(model.scores(projected, jnp.array([0, 2]), jnp.array([[0, 1], [4, 4]])).shape)
      (2, 2)
    """

    def init(key: jax.Array, sizes: Sizes) -> Params:
        keys = jax.random.split(key, 3)
        tables = {
            "user": std * jax.random.normal(keys[0], (sizes.users, dim)),
            "target_item": std * jax.random.normal(keys[1], (sizes.target_items, dim)),
        }
        row = jnp.zeros((1, dim))
        return Params(tables, module.init(keys[2], row, row).get("params", {}))

    def logits(dense: Any, rows: dict[str, jax.Array], batch: Batch, rate: Any) -> Any:
        del batch, rate
        return {"target": module.apply({"params": dense}, rows["user"], rows["target_item"])}

    return Model(
        domains=("target",),
        pairing=None,
        init=init,
        lookups=pair_lookups,
        losses=lambda dense, rows, batch, hyper: cross_entropies(
            logits(dense, rows, batch, None), batch
        ),
        project=project_rows,
        scores=lambda *args: score_pairs(logits, *args),
    )
