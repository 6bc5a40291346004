"""The best items of users of one method, by scoring every item."""

from typing import Any

import numpy as np

from conet_jax.errors import InputError
from conet_jax.models import popularity
from conet_jax.serve import newcomers
from conet_jax.serve.explain import items_of
from conet_jax.serve.lists import top_k
from conet_jax.serve.recommender import Recommender, User


def rank(
    recommender: Recommender,
    group: list[User],
    items: np.ndarray,
    k: int,
    include_seen: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks for users of one method.

    Args:
      recommender: from ``recommender.load``.
      group: the users.
      items: int[n], rows of the items to choose from, ascending.
      k: at most n.
      include_seen: whether items that a user has may be among them.

    Returns:
      (rows int[users, k] of the best items, scores f32[users, k], -inf for none).

    Raises:
      InputError: a score is not finite.
    """
    model, projected = recommender.model, recommender.projected
    rows, method = np.arange(len(group)), group[0].method
    if method == "model":
        rows = np.array([user.row for user in group])
    elif method == "popularity":
        target = recommender.dataset.target
        model = popularity.build(popularity.Options())
        counts = np.bincount(target.indices, minlength=target.num_items)
        projected = {"item": counts.astype(np.float32)}
    else:
        lists = {
            domain: [items_of(user, domain, recommender) for user in group]
            for domain in ("target", "source")
        }
        embed = recommender.newcomers.embed
        vectors = None if embed is None else embed(lists)
        projected = newcomers.project(
            model, recommender.params, recommender.interactions, lists, vectors
        )
    left_out = np.zeros((_power_of_two(len(group)), len(items) + 1), bool)
    if not include_seen:
        places = _places_seen(recommender, group, items)
        left_out[np.arange(len(group))[:, None], places] = True
    chosen, scores, finite = top_k(
        projected,
        np.pad(rows, (0, len(left_out) - len(group))).astype(np.int32),
        items.astype(np.int32),
        left_out[:, :-1],
        model=model,
        k=k,
    )
    _check_finite(finite, group)
    return np.asarray(chosen)[: len(group)], np.asarray(scores)[: len(group)]


def _check_finite(finite: Any, group: list[User]) -> None:
    finite = np.asarray(finite)[: len(group)]
    if not finite.all():
        raise InputError(
            f"a score of user {group[int(np.argmin(finite))].id!r} is NaN or infinite: the run has "
            "diverged; lower config.learning_rate or set config.clip_norm"
        )


def _places_seen(recommender: Recommender, group: list[User], items: np.ndarray) -> np.ndarray:
    """Places [users, t] in ``items`` of what each user has; padding, and items not there, are n."""
    place = np.full(recommender.dataset.target.num_items, len(items))
    place[items] = np.arange(len(items))
    seen = [place[_seen(recommender, user)] for user in group]
    out = np.full((len(group), _power_of_two(max(map(len, seen)))), len(items))
    for row, own in zip(out, seen, strict=True):
        row[: len(own)] = own
    return out


def _power_of_two(count: int) -> int:
    """The next power of two, so that few shapes are compiled."""
    return 1 << (max(count, 1) - 1).bit_length()


def _seen(recommender: Recommender, user: User) -> np.ndarray:
    """Rows of the target items that a user has in any split, or that were given."""
    if user.row is None:
        return items_of(user, "target", recommender)
    indptr, items = recommender.touched
    return items[indptr[user.row] : indptr[user.row + 1]]
