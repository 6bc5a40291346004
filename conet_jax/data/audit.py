"""What a ranking on held-out items would give to a scorer that knows next to nothing.

Leave-one-out takes the held-out pair out of training, and not those of the candidates. So an item
without a training pair, a *cold* one, is more often the held-out item than a candidate, and a
scorer that puts cold items first profits, without knowing anything that would help in use.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from conet_jax import metrics
from conet_jax.data.types import HELD_OUT, HeldOut, UserItems

K = 10  # the cut of the audit's metrics
# A warning's bounds: the least share of cold held-out items, and how many times the candidates'.
_MUCH_COLD, _TELLING = 0.05, 1.5
# Held-out parts in words.
NAMES = {
    "valid": "validation",
    "test": "test",
    "valid_source": "source validation",
    "test_source": "source test",
    "test_target_only": "test, target only",
}


def coldness(held: HeldOut, training: UserItems) -> dict[str, int | float]:
    """Shares of cold items in one held-out part, and two scorers that know only counts.

    Args:
      held: held-out items and candidates.
      training: the training pairs of their domain; an item without any is cold.

    Returns:
      ``pairs``, their number, and where there are any: ``cold_positives`` and ``cold_candidates``,
      shares in [0, 1]; ``popular_ndcg@10`` and ``popular_hit_ratio@10`` of a scorer by the number
      of training pairs; ``cold_first_ndcg@10`` and ``cold_first_hit_ratio@10`` of one that puts
      cold items first. Ties count by expectation.

    Example:
      >>> training = UserItems(np.array([0, 1, 3]), np.array([1, 1, 2]), num_items=4)
      >>> held = HeldOut(np.array([0]), np.array([3]), np.array([[0, 2]]), np.ones((1, 2), bool))
      >>> found = coldness(held, training)
      >>> found["cold_positives"], found["cold_candidates"]  # items 0 and 3 have no pair
      (1.0, 0.5)
    """
    if not len(held.users):
        return {"pairs": 0}
    count = np.bincount(training.indices, minlength=training.num_items)
    own, others = count[held.items], count[held.candidates]
    report: dict[str, int | float] = {
        "pairs": len(held.users),
        "cold_positives": float((own == 0).mean()),
        "cold_candidates": float((others[held.mask] == 0).mean()),
    }
    for name, scores in (
        ("popular", (own, others)),
        ("cold_first", tuple(np.where(c, c, count.max() + 1) for c in (own, others))),
    ):
        own_score, other_scores = scores[0][:, None], scores[1]
        above = ((other_scores > own_score) & held.mask).sum(axis=1)
        tied = ((other_scores == own_score) & held.mask).sum(axis=1)
        report[f"{name}_ndcg@{K}"] = float(metrics.ndcg(above, tied, k=K).mean())
        report[f"{name}_hit_ratio@{K}"] = float(metrics.hit_ratio(above, tied, k=K).mean())
    return report


def coldness_of(
    parts: Mapping[str, HeldOut], interactions: Mapping[str, UserItems]
) -> dict[str, dict[str, int | float]]:
    """``coldness`` of every held-out part, by name, each in its own domain."""
    return {part: coldness(held, interactions[HELD_OUT[part]]) for part, held in parts.items()}


def lines(audit: Mapping) -> list[str]:
    """The part of the printed audit that is about cold items, in plain words."""
    parts = {p: found for p, found in audit.get("cold", {}).items() if found["pairs"]}
    if not parts:
        return []
    table = _row("held-out pairs", (NAMES[part] for part in parts))
    rows = (
        ("", lambda f: f"{f['pairs']:,}"),
        (
            "whose item has no training pair (is cold)",
            lambda f: f"{100 * f['cold_positives']:.1f}%",
        ),
        ("candidates that are cold", lambda f: f"{100 * f['cold_candidates']:.1f}%"),
        (f"NDCG@{K}, HR@{K} of popularity", lambda f: _both(f, "popular")),
        ("the same with cold items put first", lambda f: _both(f, "cold_first")),
    )
    return [table, *(_row(f"  {label}", map(cell, parts.values())) for label, cell in rows)]


def warnings(audit: Mapping) -> list[str]:
    """What to beware of, each with the flag that helps."""
    found = audit.get("cold", {}).get("test", {"pairs": 0})
    if not found["pairs"]:
        return []
    positives, candidates = found["cold_positives"], found["cold_candidates"]
    if positives < _MUCH_COLD or positives < _TELLING * candidates:
        return []
    return [
        f"{100 * positives:.1f}% of the test items and {100 * candidates:.1f}% of their candidates "
        "have no training pair, so that being unknown tells a test item: read the warm metrics, or "
        "prepare with a larger --min_item_users"
    ]


def _row(label: str, cells: Iterable[str]) -> str:
    return f"{label:<45}" + "".join(f"{cell:>20}" for cell in cells)


def _both(found: Mapping, scorer: str) -> str:
    return f"{found[f'{scorer}_ndcg@{K}']:.4f}, {found[f'{scorer}_hit_ratio@{K}']:.4f}"
