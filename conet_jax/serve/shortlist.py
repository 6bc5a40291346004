"""The items that are worth ranking by the whole model: the best by the linear part of its scores.

What towers add to a score costs a hundred times the dot product beside it, and moves an item by a
few hundred places. How far is measured: of users drawn at random everything is ranked, and the
*place* of a user is how far down the order of the linear part the last of the k best stands.
Only where the linear part says next to nothing, since the user's vector is all but zero, is it far.

A shortlist has ``size`` items: twice what makes least work for a sixth of the users drawn, since of
more users some are further down. ``floor`` is the largest norm of the vector of a user drawn whose
place is beyond that: up to it everything is ranked. So a further user has another list than by
ranking everything only if its norm is larger than all such norms of the n others drawn, the chance
of which is at most 1 in n + 1.
"""

from typing import NamedTuple

import numpy as np

from conet_jax.models.neighbours import Sums

USERS = 1_200  # that are drawn
_LEAST = 32  # half of the items of a shortlist
_GROUP = 32  # items of which the best stands for all, at most


class Shortlist(NamedTuple):
    """The linear part of the scores of a catalogue, and how many of its best to rank.

    Attributes:
      users: f32[users, p].
      items: f32[p, n], of the catalogue; their product is the linear part.
      sums: what is added to it, of the catalogue; None is nothing.
      rows: int[n], the catalogue: rows of items, ascending.
      k: how many items a list may have.
      drawn: users on whom ``floor`` was measured, the size being given.
      size: items to rank; 0 before it is known.
      floor: of users with a vector of this norm, or less, everything is to be ranked.
    """

    users: np.ndarray
    items: np.ndarray
    sums: Sums | None
    rows: np.ndarray
    k: int
    drawn: int = 0
    size: int = 0
    floor: float = 0.0

    def scores(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For users int[m] the linear part f32[m, n], and its sums f32[m, n] or [1, 1]."""
        scores = self.users[users] @ self.items
        if self.sums is None:
            return scores, np.zeros((1, 1), np.float32)
        sums = self.sums.of(users)
        scores += sums
        return scores, sums

    def choose(
        self, users: np.ndarray, left_out: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best by the linear part.

        Args:
          users: int[m].
          left_out: int[t] and int[t], which of them must not get which of the catalogue.

        Returns:
          (items int32[m, size] in ascending order, their sums f32[m, size], bool[m, size] whether
          they are padding, where a user has fewer items left).
        """
        scores, sums = self.scores(users)
        scores[left_out] = -np.inf
        m, n = scores.shape
        # With the best of each group in hand, the size-th of these is a bound on the size-th best.
        group = max(1, min(_GROUP, n // (2 * self.size)))
        width = n // group
        best = scores[:, : group * width].reshape(m, group, width).max(axis=1)
        bound = np.partition(best, width - self.size, axis=1)[:, width - self.size, None]
        at = np.flatnonzero(scores >= np.maximum(bound, np.finfo(np.float32).min))
        rows, columns = np.divmod(at, n)
        counts = np.bincount(rows, minlength=m)
        places = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
        shape = m, max(int(counts.max()), self.size)
        found, values = np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float32)
        found[rows, places], values[rows, places] = columns, scores[rows, columns]
        # Some more than the size were found: of one width, one program is compiled.
        kept = np.argpartition(values, shape[1] - self.size, axis=1)[:, shape[1] - self.size :]
        kept = np.sort(kept, axis=1)
        found = np.take_along_axis(found, kept, axis=1)
        beside = np.take_along_axis(np.broadcast_to(sums, scores.shape), found, axis=1)
        padding = np.take_along_axis(values, kept, axis=1) == -np.inf
        return self.rows[found].astype(np.int32), beside, padding

    def serves(self, users: np.ndarray) -> np.ndarray:
        """Whether it is for users int[m], bool[m]; everything is to be ranked of others."""
        return np.linalg.norm(self.users[users], axis=1) > self.floor

    def __str__(self) -> str:
        """What was measured, as a sentence."""
        return (
            f"of {len(self.rows):,} items the {self.size:,} best by the linear part of the scores "
            f"are ranked: measured on {self.drawn:,} users drawn, at least "
            f"{100 * (1 - 1 / (self.drawn + 1)):.2f}% of lists are expected to be those of ranking "
            "everything"
        )

    def measured(self, drawn: np.ndarray, places: np.ndarray) -> "Shortlist | None":
        """As long as the places of users that were drawn ask for.

        Args:
          drawn: int[d], the users, in any order but one that depends on them.
          places: int[d].

        Returns:
          The shortlist; None if it would not save half of the work.
        """
        norms, n = np.linalg.norm(self.users[drawn], axis=1), len(self.rows)
        sizes = 1 << np.arange((max(_LEAST, self.k // 2) - 1).bit_length(), n.bit_length())
        some = slice(-(-len(drawn) // 6))

        def floor(size: int, those: slice) -> float:
            return float(norms[those][places[those] > size].max(initial=0.0))

        def work(size: int, those: slice) -> float:
            return size + n * float(np.mean(norms[those] <= floor(size, those)))

        if not len(sizes) or not len(drawn):
            return None
        size = min(2 * int(min(sizes, key=lambda size: work(size, some))), n)
        everyone = slice(None)
        if work(size, everyone) > n / 2:
            return None
        others = len(drawn) - some.stop
        return self._replace(drawn=others, size=size, floor=floor(size, everyone))
