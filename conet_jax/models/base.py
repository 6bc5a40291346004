"""What a model is: a few pure functions over embedding rows and dense parameters.

Tables are large and touched sparsely, dense parameters small and touched in every step; a model
keeps the two apart and does not know how either is updated.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Tables = Mapping[str, jax.Array]


class Sizes(NamedTuple):
    """Rows of the embedding tables: shared users and the items of each domain."""

    users: int
    target_items: int
    source_items: int


class Params(NamedTuple):
    """Parameters of a model: ``tables`` {name: f32[rows, dim]} and a ``dense`` pytree."""

    tables: dict[str, jax.Array]
    dense: Any


class Examples(NamedTuple):
    """Examples of one domain (Eq. 5): observed pairs and sampled negatives, all of shape [n].

    ``weights`` is 1, or 0 for padding and where a domain sits out a step. Under ``pairing: pairs``
    every example is an observed pair and ``negatives`` holds a sampled item for each, else None.
    ``folds`` is that of the observed pair that an example is or was made for, None without folds.
    """

    users: jax.Array
    items: jax.Array
    labels: jax.Array
    weights: jax.Array
    negatives: jax.Array | None = None
    folds: jax.Array | None = None


class Profile(NamedTuple):
    """A user's training items in the other domain: ``items`` i32[n, length], ``mask`` f32."""

    items: jax.Array
    mask: jax.Array


class Batch(NamedTuple):
    """One step's examples, paired by position.

    Attributes:
      target: examples of the target domain.
      source: examples of the source domain; the users are those of ``target`` under
        ``pairing: same_user``. None for a model of the target alone.
      source_profile: profiles in the source domain of ``target.users`` (``pairing: profile`` and
        ``context``).
      target_profile: profiles in the target domain of ``source.users`` (``pairing: profile``).
      cross: f32[], 1, or 0 in a step of one domain alone, where nothing crosses.
      key: PRNG key of the step, for dropout.
    """

    target: Examples
    source: Examples | None
    source_profile: Profile | None
    target_profile: Profile | None
    cross: jax.Array
    key: jax.Array


class Hyper(NamedTuple):
    """Real-valued hyper-parameters, traced: a population of runs is one ``vmap`` over these."""

    learning_rate: jax.Array
    target_weight: jax.Array
    l1: jax.Array
    dropout: jax.Array
    l2: jax.Array | float = 0.0
    negative_weight: jax.Array | float = 1.0


class Model(NamedTuple):
    """A recommender as pure functions.

    Attributes:
      domains: the domains it is trained on, ("target",) or ("target", "source").
      pairing: how examples of the two domains meet, see ``sampling``; with one domain None,
        "pairs" or "context".
      inference: "target" or "cross", see ``project``.
      init: (key, Sizes) -> Params.
      lookups: Batch -> {table: int32[...]}, the ids whose rows a step reads.
      loss: (dense, rows, batch, hyper, reduction="mean") -> (f32[], {name: f32[]}). ``rows`` has
        the shapes of ``lookups`` with the embedding dimension appended. The scalar is the joint
        loss (Eq. 7), "sum" or "mean" over each domain's examples; the dict holds, for each domain,
        ``<domain>_loss`` (summed over examples, nats) and ``<domain>_count`` (examples).
      project: (params, interactions by domain) -> projected tables for ``scores``, a dict whose
        ``item`` has a row a target item: at inference the first layer of a tower is linear in
        [user, item], so each table goes through it once. Entries named user… and item… have a row
        for each, in the order of the tables' rows; all others are dense.
      scores: (projected, users int32[n], items int32[n, c]) -> logits f32[n, c].
      diagnostics: (dense, rows, batch) -> {name: f32[]}, what crosses between the towers.
      l1_mask: dense -> pytree of bools, the parameters under the lasso (the H^l of Eq. 8).
      sweeper: None for a model trained by gradients; else (interactions by domain, Sizes) -> sweep,
        and sweep: Params -> Params is an epoch: one pass of alternating least squares, or the whole
        of a closed form. ``lookups``, ``loss``, ``diagnostics`` and ``l1_mask`` are then not used.
      closed_form: whether the first sweep is the last.
      fixed_tables: whether the tables stay as they start, and the rest alone is trained.
      copies: rows of a table for each user or item, beside each other.
      logits: whether scores are logits: their sigmoid is the probability that a pair is an observed
        one, among observed pairs and sampled negatives as in training. Else they only order.
    """

    domains: tuple[str, ...]
    pairing: str | None
    inference: str
    init: Callable[..., Params]
    project: Callable[..., Any]
    scores: Callable[..., jax.Array]
    lookups: Callable[[Batch], dict[str, jax.Array]] | None = None
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] | None = None
    diagnostics: Callable[..., dict[str, jax.Array]] = lambda dense, rows, batch: {}
    l1_mask: Callable[[Any], Any] = lambda dense: jax.tree.map(lambda _: False, dense)
    sweeper: Callable[..., Callable[[Params], Params]] | None = None
    closed_form: bool = False
    fixed_tables: bool = False
    copies: int = 1
    logits: bool = True
