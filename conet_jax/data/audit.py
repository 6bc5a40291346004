"""What a ranking on held-out items would give to a scorer that knows next to nothing.

Leave-one-out takes the held-out pair out of training, and not those of the candidates. So an item
without a training pair, a *cold* one, is more often the held-out item than a candidate, and a
scorer that puts cold items first profits, without knowing anything that would help in use.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from conet_jax import metrics
from conet_jax.data.moments import in_words
from conet_jax.data.types import DOMAINS, HELD_OUT, HeldOut, UserItems

K = 10  # the cut of the audit's metrics
# A warning's bounds: the least share of cold held-out items, and how many times the candidates'.
_MUCH_COLD, _TELLING = 0.05, 1.5
_MANY_TWINS = 0.01  # a warning's bound: share of interactions, or of held-out pairs
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
    """The printed audit after the counts of rows, in plain words."""
    return [
        *_user_lines(audit),
        *_twin_lines(audit),
        *_time_lines(audit.get("time", {})),
        *_cold_lines(audit),
    ]


def _user_lines(audit: Mapping) -> list[str]:
    found, left = audit.get("users"), audit.get("users_shared")
    if not found:
        return []
    kinds = (
        f"  {found['shared']:,} users of both domains, {found['target_only']:,} of the target "
        f"alone, {found['source_only']:,} of the source alone, before the core"
    )
    if left:
        return [
            kinds,
            f"  --users=shared would keep {left['users']:,} users, {left['target']:,} target and "
            f"{left['source']:,} source interactions",
        ]
    more = [audit[domain]["user_not_shared"] for domain in DOMAINS]
    if not any(more):
        return [kinds]
    return [
        kinds,
        f"  --users=all would keep {more[0]:,} target and {more[1]:,} source rows more, before the "
        "core",
    ]


def _time_lines(time: Mapping) -> list[str]:
    found = []
    if "users_with_ties" in time:
        found.append(
            f"  equal times: the seed chose among the latest items of {time['users_with_ties']:,} "
            "users"
        )
    if time.get("future_dropped"):
        found.append(
            f"  {time['future_rows']:,} source rows come at or after their user's first held-out "
            f"item: not trained on; {time['users_without_source']:,} users have no others"
        )
    elif "future_rows" in time:
        found.append(
            f"  {time['future_rows']:,} source rows come at or after their user's first held-out "
            "item, and are trained on"
        )
    if "cutoff" in time:
        found.append(f"  trained on what comes before {in_words(time['cutoff'])}")
    return found


def _twin_lines(audit: Mapping) -> list[str]:
    twins = audit.get("twins")
    if not twins:
        return []
    # The bounds of the first version, which did not write them.
    jaccard, least = twins.get("jaccard", 0.9), twins.get("min_users", 3)
    shares = "".join(f"{100 * twins[f'{d}_share']:>13.1f}%" for d in DOMAINS)
    found = [f"  {'interactions on twins':<43}{shares}"]
    if twins["dropped_source_interactions"]:
        dropped = twins["dropped_source_interactions"]
        found.append(f"  {'dropped: source items of twins':<43}{'-':>14}{dropped:>14,}")
    found.append(
        f"  {twins['pairs']:,} pairs of twins: Jaccard index {jaccard:g} or more, {least} shared "
        "users or more"
    )
    if "test_in_source" in twins:
        found.append(
            f"  the user's source has a twin of {100 * twins['test_in_source']:.1f}% of the test "
            f"items, {100 * twins['valid_in_source']:.1f}% of the validation items"
        )
    return found


def _cold_lines(audit: Mapping) -> list[str]:
    parts = {p: found for p, found in audit.get("cold", {}).items() if found["pairs"]}
    if not parts:
        return []
    rows = (
        ("", lambda f: f"{f['pairs']:,}"),
        ("whose item has no training pair (is cold)", lambda f: _percent(f["cold_positives"])),
        ("candidates that are cold", lambda f: _percent(f["cold_candidates"])),
        (f"NDCG@{K}, HR@{K} of popularity", lambda f: _both(f, "popular")),
        ("the same with cold items put first", lambda f: _both(f, "cold_first")),
    )
    table = _row("held-out pairs", (NAMES[part] for part in parts))
    return ["", table, *(_row(f"  {label}", map(cell, parts.values())) for label, cell in rows)]


def warnings(audit: Mapping) -> list[str]:
    """What to beware of, each with the flag that helps."""
    return [
        *_twin_warnings(audit.get("twins", {})),
        *_time_warnings(audit.get("time", {})),
        *_cold_warnings(audit.get("cold", {})),
    ]


def _time_warnings(time: Mapping) -> list[str]:
    if time.get("one_moment"):
        return [
            "all times are equal, so that nothing is the latest: the seed chose what is held out, "
            "as --split=random does"
        ]
    if time.get("future_rows") and not time["future_dropped"]:
        return [
            f"{time['future_rows']:,} source rows come at or after their user's first held-out "
            "item and may tell of it; without --keep_future they are left out"
        ]
    return []


def _twin_warnings(twins: Mapping) -> list[str]:
    if not twins or twins["dropped_source_interactions"]:
        return []
    share = max(twins["target_share"], twins["source_share"])
    held_out = max(twins.get("test_in_source", 0.0), twins.get("valid_in_source", 0.0))
    if max(share, held_out) <= _MANY_TWINS:
        return []
    return [
        f"{_percent(share)} of a domain's interactions are on twins, and the user's source has a "
        f"twin of {_percent(held_out)} of the held-out items: one product under two ids is no "
        "transfer; --drop_twins removes these source items"
    ]


def _cold_warnings(cold: Mapping) -> list[str]:
    found = cold.get("test", {"pairs": 0})
    if not found["pairs"]:
        return []
    positives, candidates = found["cold_positives"], found["cold_candidates"]
    if positives < _MUCH_COLD or positives < _TELLING * candidates:
        return []
    return [
        f"{_percent(positives)} of the test items and {_percent(candidates)} of their candidates "
        "have no training pair, so that being unknown tells a test item: read the warm metrics, or "
        "prepare with a larger --min_item_users"
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _row(label: str, cells: Iterable[str]) -> str:
    return f"{label:<45}" + "".join(f"{cell:>20}" for cell in cells)


def _both(found: Mapping, scorer: str) -> str:
    return f"{found[f'{scorer}_ndcg@{K}']:.4f}, {found[f'{scorer}_hit_ratio@{K}']:.4f}"
