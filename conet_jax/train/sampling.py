"""Epochs made on the device: permutations, exact uniform negatives, pairings.

An epoch is a function of (key, epoch): any chunk of its steps can be made on its own, from
``fold_in`` of the epoch and the step, so a run resumes from its state and its position alone and
memory is that of a chunk. Nothing here looks at held-out items: negatives are uniform over the
items that are not training positives of the user, or not what the user rated below the threshold
either (``config.negatives_avoid_seen``).

On several devices (``devices``) a batch is the same one; each device makes its part of it, and
asks those that hold the users for their items.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from conet_jax import devices
from conet_jax.models.base import Batch, Examples, History
from conet_jax.train.interactions import (
    Interactions,
    lists_of,
    past_positives,
    positive_at,
    positives_at,
    weight_at,
    weights_at,
)

PAIRINGS = ("random", "same_user", "views")


ONE_DOMAIN = (None, "pairs", "context")


SURPLUS = ("repeat", "alone")


_ROUNDS = 5


def permute(key: jax.Array, positions: jax.Array, size: int) -> jax.Array:
    """Entries of a keyed pseudo-random permutation of 0 … size - 1, at O(1) each, without a sort.

    A Feistel network over a grid of about sqrt(size) x sqrt(size) cells is a bijection of the
    grid; a value beyond ``size`` is sent through again until it falls inside (cycle walking),
    which keeps it one. A sort of the paper's 2.6 M examples takes fifteen times as long.

    Args:
      key: PRNG key; another key is another permutation.
      positions: int32[...], in [0, size).
      size: number of elements.

    Returns:
      int32[...], distinct for distinct positions.

    Example:
      >>> print(sorted(permute(jax.random.key(0), jnp.arange(5), 5).tolist()))
      [0, 1, 2, 3, 4]
    """
    rows = max(2, int(np.ceil(np.sqrt(size))))
    columns = max(2, -(-size // rows))
    keys = jax.random.bits(key, (2 * _ROUNDS,), jnp.uint32)

    def mix(x: jax.Array, k: jax.Array) -> jax.Array:  # the finaliser of MurmurHash3
        x = (x ^ k) * jnp.uint32(0x9E3779B1)
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    def feistel(x: jax.Array) -> jax.Array:
        row, column = x // columns, x % columns
        for i in range(_ROUNDS):
            row = (row + mix(column, keys[2 * i]) % rows) % rows
            column = (column + mix(row, keys[2 * i + 1]) % columns) % columns
        return row * columns + column

    def walk(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, inside = carry
        x = jnp.where(inside, x, feistel(x))
        return x, x < size

    start = jnp.asarray(positions).astype(jnp.uint32)
    x, _ = jax.lax.while_loop(lambda c: ~c[1].all(), walk, (start, jnp.zeros(start.shape, bool)))
    return x.astype(jnp.int32)


def negatives(key: jax.Array, interactions: Interactions, users: jax.Array) -> jax.Array:
    """Draws, for each user, an item uniformly from those that are not its training positives.

    With positives p_0 < p_1 < … of a user, d of n items: r uniform in [0, n - d) goes to
    r + c, c the number of positives with p_k - k <= r, found by binary search.

    Args:
      key: PRNG key.
      interactions: training positives.
      users: int32[n].

    Returns:
      int32[n].

    Example:
      >>> from conet_jax.train.interactions import to_device
      >>> liked = to_device(np.array([0, 3]), np.array([0, 1, 3]), 5)
      >>> drawn = negatives(jax.random.key(0), liked, jnp.zeros(100, int))
      >>> print(sorted(set(drawn.tolist())))
      [2, 4]
    """
    _, degree = lists_of(interactions, users)
    return past_positives(interactions, users, _below(key, interactions.num_items - degree))


def _below(key: jax.Array, bounds: jax.Array) -> jax.Array:
    """Draws uniformly from 0 … bounds - 1."""
    return devices.draw(lambda top: jax.random.randint(key, top.shape, 0, top, jnp.int32), bounds)


class Plan(NamedTuple):
    """Static shape of an epoch: everything that the compiled program depends on.

    Attributes:
      domains: ("target",) or ("target", "source").
      pairing: "random", "same_user", "views" (each domain's examples are seen by both towers:
        no example has a partner); with one domain None, "pairs" (an example is a positive
        and a negative of its user) or "context" (each example comes with its user's history in
        the source domain).
      negatives: sampled negatives a positive.
      batch_examples: examples a step and domain, positives and negatives.
      surplus: under "random" and "views", what the longer domain's surplus meets:
        "repeat" the shorter in new permutations, or "alone" (the published procedure): steps of one
        domain, without cross connections, first.
      history_length: items of a history in training at most; of longer ones a random part.
      lengths: examples of each domain in an epoch.
      steps: steps of an epoch.
      folds: number of folds of the positives, see ``out_of_fold``; 0 is none.
    """

    domains: tuple[str, ...]
    pairing: str | None
    negatives: int
    batch_examples: int
    surplus: str
    history_length: int
    lengths: tuple[int, ...]
    steps: int
    folds: int = 0

    @property
    def examples_a_positive(self) -> int:
        """Examples that an epoch makes of each training positive."""
        return self.negatives + (self.pairing != "pairs")


def plan_epoch(
    interactions: dict[str, Interactions],
    *,
    domains: tuple[str, ...],
    pairing: str | None,
    negatives: int = 1,
    batch_size: int = 128,
    surplus: str = "repeat",
    history_length: int = 32,
    folds: int = 0,
) -> Plan:
    """Lays out an epoch.

    Args:
      interactions: training positives by domain.
      domains: domains of the model.
      pairing: see ``Plan``.
      negatives: sampled negatives a positive.
      batch_size: positives a step and domain.
      surplus: see ``Plan``.
      history_length: see ``Plan``.
      folds: see ``Plan``.

    Returns:
      The ``Plan``; the number of steps is that of the longest domain's examples ("random",
      "views") or of the target's ("same_user", one domain).

    Raises:
      ValueError: an epoch has 2^31 examples or more.
    """
    each = negatives + (pairing != "pairs")
    batch = batch_size * each
    lengths = tuple(interactions[d].count * each for d in domains)
    if max(lengths) + batch >= 2**31:
        raise ValueError(
            f"an epoch of {max(lengths):,} examples is too long for int32 positions: negatives is "
            f"{negatives}"
        )
    leading = lengths[:1] if pairing == "same_user" else lengths
    return Plan(
        domains=domains,
        pairing=pairing,
        negatives=negatives,
        batch_examples=batch,
        surplus=surplus,
        history_length=history_length,
        lengths=lengths,
        steps=-(-max(leading) // batch),
        folds=folds,
    )


def sample_step(
    key: jax.Array, epoch: jax.Array, step: jax.Array, interactions: dict[str, Any], plan: Plan
) -> Batch:
    """Makes one step's batch.

    Each domain's examples are its positives and as many negatives a positive as asked for,
    shuffled together, so that the label of a partner is independent of the label of the example.

    Args:
      key: the run's PRNG key.
      epoch: int32[], from 0.
      step: int32[], step within the epoch.
      interactions: training positives by domain.
      plan: the epoch's layout.

    Returns:
      ``Batch`` of ``plan.batch_examples`` examples a domain, or of this device's part of them; in
      the last step the surplus positions have weight 0, and so have those of a part that is not
      full because the batch does not divide by the devices. The weight of an observed pair is that
      of the data, if they have weights; all other examples weigh 1.
    """
    epoch_key = jax.random.fold_in(key, epoch)
    permutation_key, step_root = jax.random.split(epoch_key)
    step_key = jax.random.fold_in(step_root, step)
    keys = dict(
        zip(
            # The third is of what is gone: the draws of the others stay what they were.
            ("target", "source", "", "source_history", "partner", "model"),
            jax.random.split(step_key, 6),
            strict=True,
        )
    )
    places = devices.places(plan.batch_examples)
    inside = places < plan.batch_examples
    positions = step * plan.batch_examples + jnp.minimum(places, plan.batch_examples - 1)

    def listed(domain: str) -> Examples:
        index = plan.domains.index(domain)
        length, longest = plan.lengths[index], max(plan.lengths)
        if plan.pairing == "same_user":
            longest = length
        at, last = positions, longest
        if plan.surplus == "alone" and length < longest:
            at, last = positions - _steps_alone(plan) * plan.batch_examples, length
        weights = ((at >= 0) & (at < last) & inside).astype(float)
        at = jnp.clip(at, 0, last - 1)
        return _listed_examples(
            jax.random.fold_in(permutation_key, index),
            keys[domain],
            interactions[domain],
            at,
            weights,
            length,
            plan,
            last > length,
        )

    target = listed("target")
    if plan.pairing in ONE_DOMAIN:
        history = None
        if plan.pairing == "context":
            history = _history(
                keys["source_history"], interactions["source"], target.users, plan.history_length
            )
        return Batch(target, None, history, jnp.asarray(0.0), keys["model"])
    cross = jnp.asarray(1.0)
    if plan.pairing == "same_user":
        counted = ((positions < plan.lengths[0]) & inside).astype(float)
        source = _partners(
            keys["partner"], interactions["source"], target.users, counted, plan.negatives
        )
        return Batch(target, source, None, cross, keys["model"])
    source = listed("source")
    if plan.surplus == "alone":
        cross = (step >= _steps_alone(plan)).astype(float)
    return Batch(target, source, None, cross, keys["model"])


def _steps_alone(plan: Plan) -> int:
    return plan.steps - -(-min(plan.lengths) // plan.batch_examples)


def _listed_examples(
    permutation_key: jax.Array,
    negative_key: jax.Array,
    interactions: Interactions,
    positions: jax.Array,
    weights: jax.Array,
    length: int,
    plan: Plan,
    repeated: bool,
) -> Examples:
    """Examples at ``positions`` of a domain's list, repeated in new permutations at its end."""
    repetition = positions // length
    key_of = jax.vmap(lambda r: jax.random.fold_in(permutation_key, r))
    if not repeated:
        index = permute(jax.random.fold_in(permutation_key, 0), positions, length)
    elif length >= positions.shape[0]:
        # A batch straddles two repetitions at most.
        two = jnp.stack([repetition[0], repetition[0] + 1])
        both = jax.vmap(lambda k: permute(k, positions % length, length))(key_of(two))
        index = jnp.where(repetition == repetition[0], both[0], both[1])
    else:
        index = jax.vmap(lambda k, p: permute(k, p, length))(key_of(repetition), positions % length)
    row, which = index // plan.examples_a_positive, index % plan.examples_a_positive
    users, positives = positives_at(interactions, row)
    drawn = negatives(negative_key, interactions.taken or interactions, users)
    if plan.pairing == "pairs":
        if interactions.weights is not None:
            weights = weights * weights_at(interactions, row)
        return Examples(users, positives, jnp.ones_like(weights), weights, drawn)
    labels = (which == 0).astype(float)
    if interactions.weights is not None:
        weights = weights * jnp.where(labels > 0, weights_at(interactions, row), 1.0)
    items = jnp.where(labels > 0, positives, drawn)
    folds = row % plan.folds if plan.folds else None
    return Examples(users, items, labels, weights, folds=folds)


def _partners(
    key: jax.Array,
    source: Interactions,
    users: jax.Array,
    weights: jax.Array,
    num_negatives: int,
) -> Examples:
    """For each target example an item of the same user: positive w.p. 1 / (1 + negatives)."""
    label_key, rank_key = jax.random.split(key)
    _, degree = lists_of(source, users)
    share = 1.0 / (1 + num_negatives)
    positive = devices.draw(lambda u: jax.random.bernoulli(label_key, share, u.shape), users)
    positive = positive & (degree > 0)
    rank = _below(rank_key, jnp.where(positive, degree, source.num_items - degree))
    items = jnp.where(
        positive,
        positive_at(source, users, jnp.where(positive, rank, 0)),
        past_positives(source, users, rank),
    )
    if source.weights is not None:
        own = weight_at(source, users, jnp.where(positive, rank, 0))
        weights = weights * jnp.where(positive, own, 1.0)
    return Examples(users, items, positive.astype(float), weights)


def _history(key: jax.Array, interactions: Interactions, users: jax.Array, length: int) -> History:
    """Training items of each user, a random run of them (wrapping round) where too many."""
    length = max(1, min(length, interactions.max_degree))
    _, degree = lists_of(interactions, users)
    some = jnp.maximum(degree, 1)
    offset = jnp.where(degree > length, _below(key, some), 0)
    slots = jnp.arange(length, dtype=jnp.int32)[None, :]
    mask = slots < degree[:, None]
    place = jnp.where(mask, (offset[:, None] + slots) % some[:, None], 0)
    items = jnp.where(mask, positive_at(interactions, users, place), 0)
    return History(items, mask.astype(float))
