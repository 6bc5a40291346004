"""The best items of users of one method, by scoring every item, or those of a shortlist."""

from typing import Any

import numpy as np

from conet_jax.errors import InputError
from conet_jax.models import neighbours, popularity
from conet_jax.serve import newcomers
from conet_jax.serve.explain import items_of
from conet_jax.serve.lists import top_k
from conet_jax.serve.recommender import Recommender, User
from conet_jax.serve.shortlist import Shortlist


def rank(
    recommender: Recommender,
    group: list[User],
    items: np.ndarray,
    k: int,
    include_seen: bool,
    shortlist: Shortlist | None = None,
    length: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks for users of one method.

    Args:
      recommender: from ``recommender.load``.
      group: the users.
      items: int[n], rows of the items to choose from, ascending.
      k: at most n.
      include_seen: whether items that a user has may be among them.
      shortlist: what to rank of the items, which are its catalogue; None is all.
      length: how many of them.

    Returns:
      (rows int[users, k] of the best items, scores f32[users, k], -inf for none).

    Raises:
      InputError: a score is not finite.
    """
    model, projected, sums = recommender.model, recommender.projected, recommender.sums
    rows, method = np.arange(len(group)), group[0].method
    if method == "model":
        rows = np.array([user.row for user in group])
    elif method == "popularity":
        target = recommender.dataset.target
        model, sums = popularity.build(popularity.Options()), None
        counts = np.bincount(target.indices, minlength=target.num_items)
        projected = {"item": counts.astype(np.float32)}
    else:
        lists = {
            domain: [items_of(user, domain, recommender) for user in group]
            for domain in ("target", "source")
        }
        embed = recommender.newcomers.embed
        vectors = None if embed is None else embed(lists)
        given = recommender.params, recommender.interactions, lists, vectors
        projected, sums = neighbours.apart(newcomers.project(model, *given), sums)
    size = _power_of_two(len(group))
    rows = np.pad(rows, (0, size - len(group))).astype(np.int32)
    out = (np.empty(0, int),) * 2 if include_seen else left_out(recommender, group, items)
    if shortlist is not None:
        listed, beside, mask = shortlist.choose(rows, out, length)
    else:
        listed, mask = items.astype(np.int32), np.zeros((size, len(items)), bool)
        mask[out] = True
        beside = None if sums is None else sums.of(rows)
        if beside is not None and len(items) < beside.shape[1]:
            beside = beside[:, items]
    chosen, scores, finite = top_k(projected, rows, listed, mask, beside, model=model, k=k)
    _check_finite(finite, group)
    return np.asarray(chosen)[: len(group)], np.asarray(scores)[: len(group)]


def _check_finite(finite: Any, group: list[User]) -> None:
    finite = np.asarray(finite)[: len(group)]
    if not finite.all():
        raise InputError(
            f"a score of user {group[int(np.argmin(finite))].id!r} is NaN or infinite: the run has "
            "diverged; lower config.learning_rate or set config.clip_norm"
        )


def left_out(
    recommender: Recommender, group: list[User], items: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the items users have: numbers of users int[t], and of the items int[t]."""
    each = [_seen(recommender, user) for user in group]
    rows, seen = np.repeat(np.arange(len(group)), list(map(len, each))), np.concatenate(each)
    columns = np.minimum(np.searchsorted(items, seen), len(items) - 1)
    among = items[columns] == seen
    return rows[among], columns[among]


def _power_of_two(count: int) -> int:
    """The next power of two, so that few shapes are compiled."""
    return 1 << (max(count, 1) - 1).bit_length()


def _seen(recommender: Recommender, user: User) -> np.ndarray:
    """Rows of the target items that a user has in any split, or that were given."""
    if user.row is None:
        return items_of(user, "target", recommender)
    indptr, items = recommender.touched
    return items[indptr[user.row] : indptr[user.row + 1]]
