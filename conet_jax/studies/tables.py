"""The numbers of a comparison's tables, as pure functions of results.

Everything that is chosen, a method's trial and the best baseline, is chosen on validation.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from conet_jax import metrics
from conet_jax.data.types import Dataset, warm_users
from conet_jax.published import Figure
from conet_jax.studies import search, statistics
from conet_jax.studies.statistics import spread_of

Row = dict[str, Any]

BASELINES = ("bprmf", "cmf", "cmf_squared", "fm", "mlp")  # the paper's
REFERENCES = ("mlp", "recipe_mlp")  # that every method is tested against
# Table 2 of the paper: HR, NDCG, MRR at 10; its MRR gives a miss 1/11 (docs/paper.md).
PAPER = {
    "Mobile": {
        "bprmf": (0.6175, 0.4891, 0.4489),
        "cmf": (0.7879, 0.5740, 0.5067),
        "fm": (0.7812, 0.5875, 0.5265),
        "mlp": (0.8405, 0.6615, 0.6210),
        "conet": (0.8480, 0.6754, 0.6373),
        "lasso": (0.8547, 0.6802, 0.6431),
    },
    "Amazon": {
        "bprmf": (0.4723, 0.3016, 0.2971),
        "cmf": (0.3712, 0.2378, 0.1966),
        "fm": (0.3685, 0.2307, 0.1884),
        "mlp": (0.5014, 0.3143, 0.3113),
        "conet": (0.5167, 0.3261, 0.3163),
        "lasso": (0.5338, 0.3424, 0.3351),
    },
}
# First numbers of interactions of the groups of users; the last group has no end.
TARGET_GROUPS = (0, 1, 2, 3, 5, 10, 20)
SOURCE_GROUPS = (0, 1, 2, 3, 5, 10, 20, 50)


class Runs(NamedTuple):
    """Runs of one config with several seeds.

    Attributes:
      results: contents of each result.json.
      ndcg: f64[users], NDCG of each user whose test item is warm, averaged over the runs; of data
        that were thinned, warm in the thinnest, too.
      commands: of each run.
    """

    results: list[dict[str, Any]]
    ndcg: np.ndarray
    commands: list[str]


class Method(NamedTuple):
    """What is known of a method.

    Attributes:
      trials: records of its search, see ``table2.tune``.
      fields: config fields of each trial by dotted name.
      best: index of the best trial, None if all failed.
      runs: by number of training interactions dropped, 0 is none; empty if all trials failed.
    """

    trials: list[dict[str, Any]]
    fields: list[dict[str, Any]]
    best: int | None
    runs: dict[int, Runs]


def report(
    name: str,
    datasets: dict[int, Dataset],
    methods: dict[str, Method],
    *,
    seeds: int,
    trials: int,
    k: int,
    command: str,
    published: Sequence[Figure] = (),
) -> dict[str, Any]:
    """Returns all tables as numbers.

    Args:
      name: of the data set.
      datasets: the data by number of interactions dropped, 0 among them.
      methods: results by method.
      seeds: runs a method.
      trials: trials a method.
      k: the cut of the metrics.
      command: that makes the tables.
      published: figures of others; of a cut other than 10 none are shown.

    Returns:
      What ``markdown.page`` prints, for JSON.
    """
    data = datasets[0]
    tested = {method: done.runs[0] for method, done in methods.items() if done.runs}
    degrees = {
        domain: np.diff(getattr(data, domain).indptr)[warm_users(*datasets.values())]
        for domain in ("target", "source")
    }
    ndcg = {method: runs.ndcg for method, runs in tested.items()}
    return {
        "data": {"name": name, "hash": data.meta["hash"], **data.meta["counts"]},
        "seeds": seeds,
        "trials": trials,
        "k": k,
        "command": command,
        "best_baseline": best_baseline(tested, k),
        "comparison": comparison(methods, k),
        "others": [figure_row(figure) for figure in published if k == 10],
        "recommended": recommended(tested),
        "search": chosen(methods, k),
        "cold": {
            "target": cold(ndcg, degrees["target"], TARGET_GROUPS),
            "source": cold(ndcg, degrees["source"], SOURCE_GROUPS),
        },
        "reduced": reduced(methods, {n: len(d.target.indices) for n, d in datasets.items()}, k),
        "commands": {
            method: [command for runs in done.runs.values() for command in runs.commands]
            for method, done in methods.items()
        },
    }


def best_baseline(tested: dict[str, Runs], k: int) -> str | None:
    """Returns the paper's baseline with the best mean validation NDCG of its runs."""
    values = {
        method: np.mean([search.value_of(result, k) for result in tested[method].results])
        for method in BASELINES
        if method in tested
    }
    return max(values, key=values.get) if values else None


def comparison(methods: dict[str, Method], k: int) -> list[Row]:
    """Returns the rows of Table 2: metrics on test, gain over the best baseline, tests."""
    tested = {method: done.runs[0] for method, done in methods.items() if done.runs}
    baseline = best_baseline(tested, k)
    rows = []
    for method, done in methods.items():
        row: Row = {"method": method}
        row["paper"] = {data: list(t[method]) for data, t in PAPER.items() if method in t}
        if not done.runs:
            rows.append(row | {"failed": done.trials[0]["failed"]})
            continue
        runs = tested[method]
        for part, split in (("warm", "test_warm"), ("published", "test")):
            row[part] = {
                metric.name: _spread(runs.results, metric.key(k), split)
                for metric in metrics.in_tables()
            }
        if baseline and method != baseline:
            base = _spread(tested[baseline].results, f"ndcg@{k}")["mean"]
            row["gain"] = row["warm"]["ndcg"]["mean"] / base - 1 if base else None
        row["against"] = {
            other: against(runs.ndcg, tested[other].ndcg)
            for other in REFERENCES
            if other in tested and other != method
        }
        rows.append(row)
    return rows


def figure_row(figure: Figure) -> Row:
    """Returns the row of a published figure: nobody's test, all test items."""
    values = {name: getattr(figure, name) for name in ("hit_ratio", "ndcg", "mrr")}
    return {
        "method": f"{figure.method} (published)",
        "paper": {},
        "published": {name: {"mean": value, "std": None} for name, value in values.items()},
        "protocol": figure.protocol._asdict(),
    }


def recommended(tested: dict[str, Runs]) -> list[Row]:
    """Returns the recommended recipe against every other method, nothing if it is not there."""
    if "recipe" not in tested:
        return []
    ours = tested["recipe"]
    rows = []
    for method, runs in tested.items():
        if method != "recipe":
            base = float(runs.ndcg.mean())
            gain = float(ours.ndcg.mean()) / base - 1 if base else None
            row = {
                "method": method,
                "gain": gain,
                "against": {method: against(ours.ndcg, runs.ndcg)},
            }
            rows.append(row)
    return rows


def _spread(results: list[dict[str, Any]], name: str, split: str = "test_warm") -> Row | None:
    """``spread_of`` over runs on a split, None where one of before has not that metric."""
    values = [result[split].get(name) for result in results]
    return None if None in values else spread_of(values)


def against(ours: np.ndarray, theirs: np.ndarray) -> Row:
    """Paired t-test and bootstrap of a metric f64[users] of the same users."""
    bootstrap = statistics.paired_bootstrap(ours, theirs)
    return {
        "p": statistics.paired_t_test(ours, theirs),
        "difference": bootstrap.mean,
        "low": bootstrap.low,
        "high": bootstrap.high,
        "p_bootstrap": bootstrap.p,
    }


def chosen(methods: dict[str, Method], k: int) -> list[Row]:
    """Returns what each search chose, with the validation NDCG of the defaults and of the best."""
    rows = []
    for method, done in methods.items():
        values = [search.value_of(trial, k) for trial in done.trials]
        best = done.best
        rows.append(
            {
                "method": method,
                "trials": len(done.trials),
                "failed": values.count(None),
                "default": values[0],
                "best": None if best is None else values[best],
                "overrides": None if best is None else done.fields[best],
                "space": {name: list(values) for name, values in search.SPACES[method].items()},
            }
        )
    return rows


def cold(ndcg: dict[str, np.ndarray], degrees: np.ndarray, first: Sequence[int]) -> list[Row]:
    """Returns the mean NDCG by a user's number of training interactions.

    Args:
      ndcg: f64[users] by method.
      degrees: int[users].
      first: the least number of each group, rising from 0; a group ends before the next.

    Returns:
      A row for each group that has users, and one for all of them.

    Example:
      >>> cold({"mlp": np.array([0.0, 0.5, 1.0])}, np.array([1, 3, 4]), (0, 1, 2, 3, 5))[1]
      {'interactions': '3-4', 'users': 2, 'ndcg': {'mlp': 0.75}}
    """
    rows = [_group(name, ndcg, inside) for name, inside in grouped(degrees, first)]
    return [*rows, _group("all", ndcg, np.ones(len(degrees), bool))]


def grouped(degrees: np.ndarray, first: Sequence[int]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name ("3-4", "5+") and the members bool[users] of each group that has users.

    Args:
      degrees: int[users].
      first: the least number of each group, see ``cold``.
    """
    groups = np.searchsorted(first, degrees, side="right") - 1
    for group, low in enumerate(first):
        inside = groups == group
        if not inside.any():
            continue
        high = first[group + 1] - 1 if group + 1 < len(first) else math.inf
        name = f"{low}+" if high == math.inf else f"{low}" if low == high else f"{low}-{high}"
        yield name, inside


def _group(name: str, ndcg: dict[str, np.ndarray], inside: np.ndarray) -> Row:
    means = {method: float(values[inside].mean()) for method, values in ndcg.items()}
    return {"interactions": name, "users": int(inside.sum()), "ndcg": means}


def reduced(methods: dict[str, Method], left: dict[int, int], k: int) -> list[Row]:
    """Returns methods on reduced training data against the MLP on all of it.

    Args:
      methods: results by method; those with no run on reduced data are left out.
      left: target training interactions by number dropped from each user.
      k: the cut of NDCG.
    """
    rows = []
    full = methods["mlp"].runs.get(0) if "mlp" in methods else None
    for method, done in methods.items():
        if set(done.runs) <= {0}:
            continue
        for drop, runs in sorted(done.runs.items()):
            row = {"method": method, "dropped": drop, "interactions": left[drop]}
            row["ndcg"] = _spread(runs.results, f"ndcg@{k}")
            if full is not None and runs is not full:
                base = _spread(full.results, f"ndcg@{k}")["mean"]
                row["gain"] = row["ndcg"]["mean"] / base - 1 if base else None
                row["against"] = {"mlp": against(runs.ndcg, full.ndcg)}
            rows.append(row)
    return rows
