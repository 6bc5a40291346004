"""The items that are worth ranking by the whole model: the best by the linear part of its scores.

What towers add to a score costs a hundred times the dot product beside it, and moves an item by
some places: the fewer, the farther the linear part of the user's scores parts the items, which goes
with the norm of its vector. So a user gets a shortlist of ``reach / norm`` items, rounded up to a
power of two. Where that is more than half of all, everything is ranked.

The reach is measured: of users drawn at random everything is ranked, and the *place* of a user is
how far down the order of the linear part the last of its k best stands. The reach is the largest
place times norm. So a further user has another list than by ranking everything only if its own is
larger than those of all n drawn, the chance of which is at most 1 in n + 1.
"""

from typing import NamedTuple

import numpy as np

from conet_jax.models.neighbours import Sums

USERS = 1_200  # that are drawn
_LEAST = 64  # items of a shortlist
_GROUP = 32  # items of which the best stands for all, at most


class Shortlist(NamedTuple):
    """The linear part of the scores of a catalogue, and how many of its best to rank for whom.

    Attributes:
      users: f32[users, p].
      items: f32[p, n], of the catalogue; their product is the linear part.
      sums: what is added to it, of the catalogue; None is nothing.
      rows: int[n], the catalogue: rows of items, ascending.
      k: how many items a list may have.
      drawn: users on whom ``reach`` was measured.
      reach: items to rank, times the norm of the user's vector.
    """

    users: np.ndarray
    items: np.ndarray
    sums: Sums | None
    rows: np.ndarray
    k: int
    drawn: int = 0
    reach: float = 0.0

    def scores(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For users int[m] the linear part f32[m, n], and its sums f32[m, n] or [1, 1]."""
        scores = self.users[users] @ self.items
        if self.sums is None:
            return scores, np.zeros((1, 1), np.float32)
        sums = self.sums.of(users)
        scores += sums
        return scores, sums

    def choose(
        self, users: np.ndarray, left_out: tuple[np.ndarray, np.ndarray], size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best by the linear part.

        Args:
          users: int[m].
          left_out: int[t] and int[t], which of them must not get which of the catalogue.
          size: how many.

        Returns:
          (items int32[m, size] in ascending order, their sums f32[m, size], bool[m, size] whether
          they are padding, where a user has fewer items left).
        """
        scores, sums = self.scores(users)
        scores[left_out] = -np.inf
        m, n = scores.shape
        # With the best of each group in hand, the size-th of these is a bound on the size-th best.
        group = max(1, min(_GROUP, n // (2 * size)))
        width = n // group
        best = scores[:, : group * width].reshape(m, group, width).max(axis=1)
        bound = np.partition(best, width - size, axis=1)[:, width - size, None]
        at = np.flatnonzero(scores >= np.maximum(bound, np.finfo(np.float32).min))
        rows, columns = np.divmod(at, n)
        counts = np.bincount(rows, minlength=m)
        places = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
        shape = m, max(int(counts.max()), size)
        found, values = np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float32)
        found[rows, places], values[rows, places] = columns, scores[rows, columns]
        # Some more than the size were found: of one width, one program is compiled.
        kept = np.argpartition(values, shape[1] - size, axis=1)[:, shape[1] - size :]
        kept = np.sort(kept, axis=1)
        found = np.take_along_axis(found, kept, axis=1)
        beside = np.take_along_axis(np.broadcast_to(sums, scores.shape), found, axis=1)
        padding = np.take_along_axis(values, kept, axis=1) == -np.inf
        return self.rows[found].astype(np.int32), beside, padding

    def lengths(self, users: np.ndarray) -> np.ndarray:
        """Items to rank for users int[m], int[m]; all of them where it is more than half."""
        n = len(self.rows)
        norms = np.linalg.norm(self.users[users], axis=1)
        wanted = self.reach / np.maximum(norms, self.reach / n or 1.0)  # n at most
        wanted = np.clip(np.where(norms > 0, wanted, n), max(_LEAST, self.k), n)
        wanted = 1 << np.ceil(np.log2(wanted) - 1e-6).astype(int)  # of 64 by rounding, 64
        return np.where(wanted > n / 2, n, wanted)

    def __str__(self) -> str:
        """What was measured, as a sentence."""
        n = len(self.rows)
        lengths = self.lengths(np.arange(len(self.users)))
        return (
            f"of {n:,} items the best by the linear part of the scores are ranked, "
            f"{np.mean(lengths):,.0f} a user on average: measured on {self.drawn:,} users drawn, "
            f"at least {100 * (1 - 1 / (self.drawn + 1)):.2f}% of lists are expected to be those "
            "of ranking everything"
        )

    def measured(self, drawn: np.ndarray, places: np.ndarray) -> "Shortlist | None":
        """With the reach that the places of users ask for.

        Args:
          drawn: int[d], the users.
          places: int[d].

        Returns:
          The shortlist; None if it would not save half of the work.
        """
        if not len(drawn):
            return None
        norms = np.linalg.norm(self.users[drawn], axis=1)
        found = self._replace(drawn=len(drawn), reach=float((places * norms).max()))
        return None if found.lengths(drawn).mean() > len(self.rows) / 2 else found
