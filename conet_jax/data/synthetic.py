"""Two synthetic domains whose true preferences are known, and with them the best possible ranker.

A user has a direction in each domain, an item a direction and a popularity. In a domain a user
picks items one after another without replacement, each with probability proportional to

    exp(cosine(user, item) / noise) * popularity(item).

``transfer`` is the share of the target's direction that the source's shows. A test item is one of
the user's picks and the candidates are not, so ranking by the log of that product is the optimal
ranker: no model can beat it in expectation (``true_scores``).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from conet_jax.errors import InputError

if TYPE_CHECKING:
    from conet_jax.data.types import Dataset


MIN_TARGET_ITEMS = 3  # a test item, a validation item and one to train on
_BLOCK = 1 << 20  # pairs in memory at once: about 100 MB at 8 dimensions
_ROUNDS = 8  # of proposals before a user's last picks are made by looking at every item
_PILOT = 512  # popularity-drawn items that estimate how many proposals a user accepts


class Truth(NamedTuple):
    """What generated a domain; log intensity = user_factors @ item_factors.T + log_popularity."""

    user_factors: NDArray[np.float64]  # [num_users, dim], of length 1
    item_factors: NDArray[np.float64]  # [num_items, dim], of length 1 / noise
    log_popularity: NDArray[np.float64]  # [num_items], log of probabilities


class SyntheticDomains(NamedTuple):
    """Distinct pairs of two domains with the same users, sorted by (user, item), and the truth."""

    target_users: NDArray[np.int32]
    target_items: NDArray[np.int32]
    source_users: NDArray[np.int32]
    source_items: NDArray[np.int32]
    target_truth: Truth
    source_truth: Truth


def generate(
    *,
    num_users: int,
    num_target_items: int,
    num_source_items: int,
    target_interactions: int,
    source_interactions: int,
    dim: int = 6,
    transfer: float = 1.0,
    popularity: float = 0.7,
    activity: float = 0.8,
    noise: float = 0.2,
    seed: int,
) -> SyntheticDomains:
    """Draws two domains that share users, with exactly the given numbers of interactions.

    Every user has at least one source item and, where the total allows, three target items; nobody
    has more than half of a domain's items. Sizes up to the paper's Table 1 take seconds, and memory
    grows with the number of interactions, not with users times items.

    Args:
      num_users: users, each in both domains.
      num_target_items: items of the target domain; some may stay without interactions.
      num_source_items: items of the source domain.
      target_interactions: distinct (user, item) pairs of the target domain.
      source_interactions: distinct (user, item) pairs of the source domain.
      dim: dimensions of the latent directions; more are harder to learn.
      transfer: in [0, 1], correlation of a user's factors in the source with those in the target.
      popularity: exponent of the items' Zipf law; 0 makes them equally popular.
      activity: standard deviation of the log of the users' activity.
      noise: temperature of the picks; a large one leaves popularity alone.
      seed: the same arguments and seed give the same arrays.

    Returns:
      Interactions and truth.

    Raises:
      InputError: an argument is out of range, or the interactions do not fit the sizes.

    Example:
      >>> domains = generate(num_users=50, num_target_items=30, num_source_items=40,
      ...                    target_interactions=200, source_interactions=400, seed=0)
      >>> domains.target_users.shape, domains.source_users.shape
      ((200,), (400,))
    """
    for name, value, low, high in (
        ("num_users", num_users, 1, np.inf),
        ("num_target_items", num_target_items, 2, np.inf),
        ("num_source_items", num_source_items, 2, np.inf),
        ("dim", dim, 1, np.inf),
        ("transfer", transfer, 0, 1),
        ("popularity", popularity, 0, np.inf),
        ("activity", activity, 0, np.inf),
        ("noise", noise, 1e-3, np.inf),
        ("seed", seed, 0, np.inf),
    ):
        if not low <= value <= high:
            bounds = f"in [{low}, {high}]" if high < np.inf else f"at least {low}"
            raise InputError(f"synthetic {name} must be {bounds}, got {value}")

    # A stream for each part: the target stays the same when only the source's arguments change.
    user_rng, target_rng, source_rng = np.random.default_rng(seed).spawn(3)
    shared, other = user_rng.standard_normal((2, num_users, dim))
    target_users, target_items, target_truth = _domain(
        target_rng,
        shared,
        name="target",
        num_items=num_target_items,
        interactions=target_interactions,
        least=min(MIN_TARGET_ITEMS, target_interactions // num_users),
        popularity=popularity,
        activity=activity,
        noise=noise,
    )
    source_users, source_items, source_truth = _domain(
        source_rng,
        transfer * shared + np.sqrt(1 - transfer**2) * other,
        name="source",
        num_items=num_source_items,
        interactions=source_interactions,
        least=1,
        popularity=popularity,
        activity=activity,
        noise=noise,
    )
    return SyntheticDomains(
        target_users, target_items, source_users, source_items, target_truth, source_truth
    )


def true_scores(domains: SyntheticDomains, users: ArrayLike, items: ArrayLike) -> NDArray:
    """Log intensities of target pairs up to a constant: the scores of the oracle ranker.

    Args:
      domains: from ``generate``.
      users: int[n].
      items: int[n, c], target items.

    Returns:
      f64[n, c].
    """
    truth = domains.target_truth
    users, items = np.asarray(users), np.asarray(items)
    affinity = np.einsum("nd,ncd->nc", truth.user_factors[users], truth.item_factors[items])
    return affinity + truth.log_popularity[items]


def dataset(
    *, candidates: int = 99, seed: int, **sizes: float
) -> tuple["Dataset", Callable[[ArrayLike, ArrayLike], NDArray]]:
    """A data set of two synthetic domains, split at random, and its oracle.

    Args:
      candidates: negatives for each held-out item.
      seed: of the domains and of the split.
      **sizes: the other arguments of ``generate``.

    Returns:
      The data set and ``oracle(users int[n], items int[n, c]) -> f64[n, c]``.
    """
    from conet_jax.data.assemble import from_arrays

    domains = generate(seed=seed, **sizes)
    data = from_arrays(
        *domains[:4],
        num_users=sizes["num_users"],
        num_target_items=sizes["num_target_items"],
        num_source_items=sizes["num_source_items"],
        candidates=candidates,
        seed=seed,
    )
    return data, lambda users, items: true_scores(domains, users, items)


def _domain(
    rng: np.random.Generator,
    user_factors: NDArray,
    *,
    name: str,
    num_items: int,
    interactions: int,
    least: int,
    popularity: float,
    activity: float,
    noise: float,
) -> tuple[NDArray[np.int32], NDArray[np.int32], Truth]:
    num_users = len(user_factors)
    most = num_items // 2
    if not num_users <= interactions <= num_users * most:
        raise InputError(
            f"synthetic {name}_interactions must be from {num_users} (one a user) to "
            f"{num_users * most} (half of the items for each), got {interactions}"
        )
    counts = _counts(rng, num_users, interactions, least, most, activity)
    # Popularity in whole tickets: drawing a ticket draws an item, and its share is known exactly.
    share = rng.permutation(np.arange(1, num_items + 1) ** -popularity)
    tickets = np.ceil(share / share.sum() * max(64 * num_items, 1 << 16)).astype(np.int64)
    item_factors = rng.standard_normal((num_items, user_factors.shape[1]))
    truth = Truth(_unit(user_factors), _unit(item_factors) / noise, np.log(tickets / tickets.sum()))
    lottery = np.repeat(np.arange(num_items, dtype=np.int32), tickets)
    users, items = _pick(rng, counts, truth, lottery)
    return users, items, truth


def _unit(factors: NDArray) -> NDArray:
    return factors / np.linalg.norm(factors, axis=1, keepdims=True)


def _counts(
    rng: np.random.Generator, num_users: int, total: int, least: int, most: int, activity: float
) -> NDArray[np.int64]:
    """Items a user has: log-normal activity, from ``least`` to ``most``, exactly ``total``."""
    weights = np.exp(activity * rng.standard_normal(num_users))
    counts = np.full(num_users, least)
    while rest := total - counts.sum():
        free = np.flatnonzero(counts < most)
        more = rng.multinomial(rest, weights[free] / weights[free].sum())
        counts[free] = np.minimum(counts[free] + more, most)
    return counts


def _pick(
    rng: np.random.Generator, counts: NDArray, truth: Truth, lottery: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Each user's ``counts`` picks, exactly in proportion to the intensity, one after another.

    An item is proposed by popularity and accepted with exp(affinity - the largest affinity); a
    repeat is passed over. That is picking without replacement, and so is going on from any point
    by Gumbel-top-k over all items: done for users for whom it takes fewer looks, and for leftovers.
    """
    num_items = len(truth.log_popularity)
    pilot = truth.item_factors[lottery[rng.integers(len(lottery), size=_PILOT)]]
    peak = np.linalg.norm(truth.item_factors[0])
    start, keys = 0, []
    while start < len(counts):
        # As many users as make one block of proposals; one who needs more looks at all items.
        users = np.arange(start, min(start + max(_BLOCK // _PILOT, 1), len(counts)))
        rate = np.exp(truth.user_factors[users] @ pilot.T - peak).mean(1)
        looks = np.minimum(np.ceil(1.2 * counts[users] / rate) + 8, num_items)
        users = users[: max(np.searchsorted(np.cumsum(looks), _BLOCK), 1)]
        rate, need = rate[: len(users)], counts[users].copy()
        held = np.empty(0, np.int64)  # user within this block * num_items + item
        for _ in range(_ROUNDS):
            looks = np.ceil(1.2 * need / rate) + 8
            looks = np.where((need > 0) & (looks < num_items), looks, 0).astype(np.int64)
            owner = np.repeat(np.arange(len(users)), looks)
            if not len(owner):
                break
            item = lottery[rng.integers(len(lottery), size=len(owner))]
            affinity = np.einsum(
                "nd,nd->n", truth.user_factors[users[owner]], truth.item_factors[item]
            )
            accepted = rng.standard_exponential(len(owner)) >= peak - affinity
            new = owner[accepted] * num_items + item[accepted]
            held = _first(held, new, need, num_items)
            need = counts[users] - np.bincount(held // num_items, minlength=len(users))
        left = np.flatnonzero(need)
        rows = max(_BLOCK // num_items, 1)
        for some in (left[i : i + rows] for i in range(0, len(left), rows)):
            scores = truth.user_factors[users[some]] @ truth.item_factors.T + truth.log_popularity
            scores += rng.gumbel(size=scores.shape)
            mine = held[np.isin(held // num_items, some)]
            scores[np.searchsorted(some, mine // num_items), mine % num_items] = -np.inf
            most = need[some].max()
            best = np.argpartition(-scores, most - 1)[:, :most]
            order = np.argsort(-np.take_along_axis(scores, best, 1))
            best = np.take_along_axis(best, order, 1)
            taken = np.arange(most) < need[some][:, None]
            held = np.append(held, (some[:, None] * num_items + best)[taken])
        keys.append(np.sort(held) + start * num_items)
        start += len(users)
    keys = np.concatenate(keys)
    return (keys // num_items).astype(np.int32), (keys % num_items).astype(np.int32)


def _first(held: NDArray, new: NDArray, need: NDArray, num_items: int) -> NDArray:
    """Adds to ``held`` each user's first ``need`` of the ``new`` keys that are not held yet."""
    _, at = np.unique(np.concatenate([held, new]), return_index=True)
    fresh = new[np.sort(at[at >= len(held)]) - len(held)]  # in the order in which they came
    owner = fresh // num_items  # ascending: the proposals were
    place = np.arange(len(fresh)) - np.searchsorted(owner, owner)
    return np.concatenate([held, fresh[place < need[owner]]])
