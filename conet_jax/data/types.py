"""A data set as arrays. Imports no Polars."""

import hashlib
import json
from collections.abc import Mapping
from functools import reduce
from typing import NamedTuple

import numpy as np

from conet_jax.errors import InputError

DOMAINS = ("target", "source")
# Counts of the three kinds of users, in the order in which they are numbered.
KINDS = ("shared_users", "target_only_users", "source_only_users")


class UserItems(NamedTuple):
    """Training positives of one domain, CSR by user."""

    indptr: np.ndarray  # int32[num_users + 1]
    indices: np.ndarray  # int32[nnz], strictly increasing within a user
    num_items: int
    weights: np.ndarray | None = None  # f32[nnz], above 0, of data with a column of weights

    def kept(self, keep: np.ndarray) -> "UserItems":
        """Returns these without the pairs where ``keep`` bool[nnz] is False."""
        before = np.concatenate([[0], np.cumsum(keep)]).astype(self.indptr.dtype)
        weights = None if self.weights is None else self.weights[keep]
        return UserItems(before[self.indptr], self.indices[keep], self.num_items, weights)


class HeldOut(NamedTuple):
    """Held-out pairs, each against its own candidates: one a user, or more by ``--split=ratio``."""

    users: np.ndarray  # int32[n], increasing; a user stands there once for each held-out item
    items: np.ndarray  # int32[n], the held-out positive, strictly increasing within a user
    candidates: np.ndarray  # int32[n, c], negatives
    mask: np.ndarray  # bool[n, c], False where a candidate does not count


class Dataset(NamedTuple):
    """One prepared pair of domains; ``meta`` has keys counts, audit, options and hash.

    Users of both domains come first, then those of the target alone, then those of the source
    alone; the last two only in data prepared by ``--users=all``. ``valid`` and ``test`` hold users
    of both domains.
    """

    target: UserItems  # training positives only: test and validation items are removed
    source: UserItems  # all source interactions
    valid: HeldOut
    test: HeldOut
    user_ids: np.ndarray  # object[num_users] of str: the raw id of each row
    target_item_ids: np.ndarray
    source_item_ids: np.ndarray
    meta: dict
    valid_source: HeldOut | None = None  # of the source's items, by --hold_out=both
    test_source: HeldOut | None = None
    test_target_only: HeldOut | None = None  # target items of users without a source, --users=all
    seen: UserItems | None = None  # target pairs rated below the threshold: known, and no positives

    @property
    def num_users(self) -> int:
        """All users."""
        return len(self.user_ids)

    @property
    def num_target_only(self) -> int:
        """Users of the target alone."""
        return self.meta["counts"].get("target_only_users", 0)

    @property
    def num_source_only(self) -> int:
        """Users of the source alone."""
        return self.meta["counts"].get("source_only_users", 0)

    @property
    def num_shared(self) -> int:
        """Users of both domains."""
        return self.num_users - self.num_target_only - self.num_source_only


# The held-out parts that a data set may have, and the domain of their items.
HELD_OUT = {
    "valid": "target",
    "test": "target",
    "valid_source": "source",
    "test_source": "source",
    "test_target_only": "target",
}


def held_out_parts(dataset: Dataset) -> dict[str, HeldOut]:
    """The held-out parts that a data set has, by name."""
    parts = {part: getattr(dataset, part) for part in HELD_OUT}
    return {part: held for part, held in parts.items() if held is not None}


def held_out_counts(parts: Mapping[str, HeldOut]) -> dict[str, int]:
    """Users of each held-out part, and its pairs where these are more.

    Example:
      >>> none = np.zeros((2, 0), np.int32)
      >>> one, two = (HeldOut(np.array(u), np.arange(2), none, none > 0) for u in ([0, 1], [3, 3]))
      >>> held_out_counts({"valid": one, "test": two})
      {'valid_users': 2, 'test_users': 1, 'test_pairs': 2}
    """
    counts = {}
    for part, held in parts.items():
        counts |= {f"{part}_{what}": number for what, number in users_and_pairs(held.users).items()}
    return counts


def users_and_pairs(users: np.ndarray) -> dict[str, int]:
    """The number of distinct ``users``, and that of all where it is another.

    Example:
      >>> users_and_pairs(np.array([0, 4, 4])), users_and_pairs(np.array([0, 4]))
      ({'users': 2, 'pairs': 3}, {'users': 2})
    """
    distinct = len(np.unique(users))
    return {"users": distinct} | ({} if distinct == len(users) else {"pairs": len(users)})


def warm(held_out: HeldOut, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is left of held-out items among items with training pairs alone.

    In use there are no items that nobody has had. A protocol that takes a positive's own pair out
    of training, and not the candidates', makes some: those that rank them first, or last, are
    flattered, or wronged.

    Args:
      held_out: n pairs.
      trained: bool[items], whether an item has a training pair.

    Returns:
      (bool[n], whose item has one and is ranked against one that has; bool[n, c], the candidates
      that count).

    Example:
      >>> items, candidates = np.array([0, 2]), np.array([[1], [1]])
      >>> held_out = HeldOut(np.arange(2), items, candidates, np.ones((2, 1), bool))
      >>> warm(held_out, np.array([True, True, False]))[0].tolist()
      [True, False]
    """
    mask = held_out.mask & trained[held_out.candidates]
    return trained[held_out.items] & mask.any(axis=1), mask


def warm_users(*datasets: Dataset) -> np.ndarray:
    """Returns the users of whom a test item has a training pair in all of the data sets, int[n]."""
    found = [np.unique(d.test.users[warm(d.test, trained_items(d.target))[0]]) for d in datasets]
    return reduce(np.intersect1d, found)


def trained_items(interactions: UserItems) -> np.ndarray:
    """Whether each item has a training pair: bool[items]."""
    trained = np.zeros(interactions.num_items, bool)
    trained[interactions.indices] = True
    return trained


def check_indices(what: str, indices: np.ndarray, size: int) -> None:
    """Raises ``InputError`` unless all are in [0, size): a device would read another row silently.

    Example:
      >>> check_indices("item", np.array([0, 7]), 5)
      Traceback (most recent call last):
      ...
      conet_jax.errors.InputError: item 7 is out of range: expected 0 to 4
    """
    indices = np.asarray(indices)
    if indices.size and not 0 <= indices.min() <= indices.max() < size:
        wrong = indices[(indices < 0) | (indices >= size)].flat[0]
        raise InputError(f"{what} {wrong} is out of range: expected 0 to {size - 1}")


def arrays(dataset: Dataset) -> dict[str, np.ndarray]:
    """The arrays of a data set by name, in a fixed order, ids as UTF-8 bytes and offsets."""
    named = {}
    for domain in DOMAINS:
        rows = getattr(dataset, domain)
        named |= {f"{domain}_indptr": rows.indptr, f"{domain}_indices": rows.indices}
        if rows.weights is not None:
            named[f"{domain}_weights"] = rows.weights
    for part, held in held_out_parts(dataset).items():
        for field, values in held._asdict().items():
            named[f"{part}_{field}"] = values
    if dataset.seen is not None:
        named |= {"seen_indptr": dataset.seen.indptr, "seen_indices": dataset.seen.indices}
    for name in ("user_ids", "target_item_ids", "source_item_ids"):
        # Item ids cannot hold lone surrogates when read from files; from elsewhere they may.
        encoded = [text.encode("utf-8", "surrogatepass") for text in getattr(dataset, name)]
        named[f"{name}_bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
        lengths = np.array([len(text) for text in encoded], np.int64)
        named[f"{name}_offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return named


def content_hash(dataset: Dataset) -> str:
    """SHA-256 over arrays, ids and options: equal for equal content, however it is stored."""
    options = dict(dataset.meta["options"])
    if "drop_twins" in options:  # as the first version wrote them: data keep their hashes
        options.setdefault("twin_jaccard", 0.9)
        if options.get("twin_users") == 3:
            del options["twin_users"]
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for name, values in arrays(dataset).items():
        digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def thinned(dataset: Dataset, keep: np.ndarray, digest: str) -> Dataset:
    """Returns data without the target's training pairs where ``keep`` bool[nnz] is False.

    Args:
      dataset: the data.
      keep: of each training pair of the target.
      digest: the hash of what is left.
    """
    target, counts = dataset.target.kept(keep), dict(dataset.meta["counts"])
    counts["target_interactions"] -= int((~keep).sum())
    counts["target_density"] = counts["target_interactions"] / (
        dataset.num_users * target.num_items
    )
    return dataset._replace(target=target, meta=dataset.meta | {"counts": counts, "hash": digest})
