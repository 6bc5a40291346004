"""Markdown of studies: tables and their cells, and the page of a comparison."""

import math
from typing import Any

from conet_jax import metrics
from conet_jax.studies.points import described
from conet_jax.studies.tables import BASELINES, PAPER, REFERENCES, Row


def number(value: float | None) -> str:
    """Returns four digits, a dash for None."""
    return "-" if value is None else f"{value:.4f}"


def mean_cell(spread: Row | None) -> str:
    """Returns "mean ± std" of ``spread_of``, a dash where there is none.

    >>> mean_cell({"mean": 0.25, "std": 0.01}), mean_cell({"mean": 0.25, "std": None})
    ('0.2500 ± 0.0100', '0.2500')
    """
    if spread is None or math.isnan(spread["mean"]):
        return "-"
    deviation = "" if spread["std"] is None else f" ± {spread['std']:.4f}"
    return number(spread["mean"]) + deviation


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Returns the lines of a Markdown table, all columns but the first flush right."""
    ruler = ["---", *(["---:"] * (len(head) - 1))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ruler, *rows)]


def difference_cells(test: Row | None) -> list[str]:
    """Returns the cells of ``against``: p of the t-test; difference with the bootstrap interval."""
    if test is None:
        return ["-", "-"]
    p = "<0.0001" if test["p"] < 1e-4 else f"{test['p']:.4f}"
    return [p, f"{test['difference']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}]"]


def page(report: dict[str, Any]) -> str:
    """Returns the tables of ``tables.report`` as a page."""
    data, ndcg = report["data"], f"NDCG@{report['k']}"
    lines = [
        f"# {data['name']}",
        "",
        f"Data {data['hash'][:12]}: {data['users']:,} users, {data['test_users']:,} of them with a "
        f"test item and {data['valid_users']:,} with a validation item. Seeds {report['seeds']}, "
        f"{report['trials']} trials of each method (popularity has nothing to choose), chosen on "
        "warm validation; each run is tested once. Made by",
        "",
        f"    {report['command']}",
        "",
        *_comparison_lines(report),
        *_recommended_lines(report),
        *("", f"## Search: warm validation {ndcg}", ""),
        *table(
            ["method", "trials", "failed", "defaults", "best", "chosen"],
            [_search_cells(row) for row in report["search"]],
        ),
        *(
            "",
            "The spaces are in conet_jax/studies/search.py and, with all commands, in table2.json.",
        ),
    ]
    for domain, rows in report["cold"].items():
        lines += ["", f"## Warm test {ndcg} by a user's {domain} interactions in training", ""]
        lines += table(
            ["interactions", "users", *rows[0]["ndcg"]], [_cold_cells(row) for row in rows]
        )
    if report["reduced"]:
        lines += ["", "## Reduced training data, against the MLP on all of it", ""]
        lines += table(
            ["method", "dropped a user", "left", ndcg, "gain over mlp", "p", f"{ndcg} less mlp's"],
            [_reduced_cells(row) for row in report["reduced"]],
        )
    return "\n".join(lines) + "\n"


def _comparison_lines(report: dict[str, Any]) -> list[str]:
    k, rows = report["k"], report["comparison"]
    names = [metric.heading(k) for metric in metrics.in_tables()]
    head = ["method", *(f"warm {name}" for name in names), *(f"all {name}" for name in names)]
    head.append(f"gain over {report['best_baseline'] or 'the best baseline'}")
    for other in REFERENCES:
        head += [f"p against {other}", f"NDCG@{k} less {other}'s"]
    head += [f"paper, {name}" for name in PAPER]
    return [
        f"## Test, {report['data']['test_users']:,} users",
        "",
        *table(head, [_comparison_cells(row) for row in (*rows, *report["others"])]),
        "",
        "Warm: test items with a training pair among candidates with one; all: as published. Mean "
        "± sample standard deviation over seeds; without ± one run, deterministic or of one seed. "
        f"Gain and tests are of the warm NDCG@{k}. Gain: over the one of {', '.join(BASELINES)} "
        "that is best on "
        f"validation. p: paired t-test over users on NDCG@{k} averaged over seeds; differences "
        "with the 95% interval of a paired bootstrap over users. Paper: HR / NDCG / MRR at 10 of "
        "its Table 2, on its own data; its MRR gives a miss 1/11.",
        *(f"\n{row['method']} failed: {row['failed']}" for row in rows if "failed" in row),
        *_protocol_lines(report["others"]),
    ]


def _protocol_lines(rows: list[Row]) -> list[str]:
    """What the rows of others rest on, each protocol once."""
    protocols = {tuple(row["protocol"].values()): row["protocol"] for row in rows}
    return [
        f"\nPublished: {p['source']}. Data: {p['data']}. Protocol: {p['ranking']}. Epoch: "
        f"{p['chosen']}; ours is the best on warm validation. Not runs of ours, so without tests."
        for p in protocols.values()
    ]


def _recommended_lines(report: dict[str, Any]) -> list[str]:
    rows = report["recommended"]
    if not rows:
        return []
    cells = [[row["method"], _gain(row), *_test_cells(row, row["method"])] for row in rows]
    head = ["against", f"gain in NDCG@{report['k']}", "p", "difference"]
    return ["", "## The recommended recipe against each", "", *table(head, cells)]


def _comparison_cells(row: Row) -> list[str]:
    cells = [row["method"], *_metric_cells(row), _gain(row)]
    for other in REFERENCES:
        cells += _test_cells(row, other)
    for name in PAPER:
        values = row["paper"].get(name)
        cells.append(" / ".join(map(number, values)) if values else "-")
    return cells


def _metric_cells(row: Row) -> list[str]:
    return [
        mean_cell(row.get(part, {}).get(metric.name))
        for part in ("warm", "published")
        for metric in metrics.in_tables()
    ]


def _search_cells(row: Row) -> list[str]:
    overrides = row["overrides"]
    text = "-" if overrides is None else described(overrides)
    numbers = [number(row["default"]), number(row["best"])]
    return [row["method"], str(row["trials"]), str(row["failed"]), *numbers, text]


def _cold_cells(row: Row) -> list[str]:
    return [row["interactions"], f"{row['users']:,}", *map(number, row["ndcg"].values())]


def _reduced_cells(row: Row) -> list[str]:
    cells = [row["method"], str(row["dropped"]), f"{row['interactions']:,}", mean_cell(row["ndcg"])]
    return [*cells, _gain(row), *_test_cells(row, "mlp")]


def _test_cells(row: Row, other: str) -> list[str]:
    return difference_cells(row.get("against", {}).get(other))


def _gain(row: Row) -> str:
    return "-" if row.get("gain") is None else f"{100 * row['gain']:+.2f}%"
