"""What a sweep has found: its points ranked, as CSV, Markdown and a plot."""

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from conet_jax import config as config_lib
from conet_jax import metrics
from conet_jax.files import write_with
from conet_jax.studies import search
from conet_jax.studies.drawing import load_matplotlib
from conet_jax.studies.markdown import mean_cell, table
from conet_jax.studies.points import Point, command, described
from conet_jax.studies.runner import Record
from conet_jax.studies.statistics import spread_of

if TYPE_CHECKING:
    from conet_jax.studies.sweep import Sweep


class Ranked(NamedTuple):
    """A point whose runs are all done.

    Attributes:
      number: of the point.
      fields: of the point.
      metrics: {metric: f64[seeds]} on validation, NaN where a record of before lacks it.
      value: mean over seeds of what points are ranked by.
    """

    number: int
    fields: Point
    metrics: dict[str, np.ndarray]
    value: float


def ranked(sweep: "Sweep", rows: list[Record], records: list[Record]) -> list[Ranked]:
    """Returns the points none of whose runs failed, the best mean value first.

    Args:
      sweep: what is swept.
      rows: of sweep.csv.
      records: of the runs of the rows.
    """
    found, k = [], sweep.config.eval_k[0]
    for number, point in enumerate(sweep.points):
        own = [at for at, row in enumerate(rows) if row["point"] == number]
        if own and not any(rows[at]["failed"] for at in own):
            numbers = {
                name: np.array([rows[at][name] for at in own], np.float64)
                for name in search.columns({}, k)
            }
            value = np.mean([search.value_of(records[at], k) for at in own])
            found.append(Ranked(number, point, numbers, float(value)))
    return sorted(found, key=lambda point: -point.value)


def train_command(sweep: "Sweep", point: Point, seed: int) -> str:
    """Returns the launch/train.py command of a run of a point."""
    folder = f"--workdir={sweep.workdir / 'best' / f'seed_{seed}'}"
    return command("train", sweep.file, {**sweep.given, **point, "seed": seed}, folder)


def markdown(sweep: "Sweep", rows: list[Record], points: list[Ranked]) -> str:
    """Returns sweep.md: the best point with its commands, and every point."""
    names = [metric.key(sweep.config.eval_k[0]) for metric in metrics.in_tables()]
    names = [*(f"warm {name}" for name in names), *names]
    failed = sum(bool(row["failed"]) for row in rows)
    lines = [
        f"# Sweep of {sweep.config.name} {sweep.config.variant}".rstrip(),
        "",
        f"{len(sweep.points)} points, {len(rows)} runs, {failed} of them failed; every number is "
        "of the validation split, mean ± sample standard deviation over seeds.",
        "",
    ]
    if points:
        best = points[0]
        chosen_by = f"warm ndcg@{sweep.config.eval_k[0]}"
        lines += [f"Best by validation {chosen_by}: {described(best.fields)}", ""]
        seeds = [row["seed"] for row in rows if row["point"] == best.number]
        lines += [f"    {train_command(sweep, best.fields, seed)}" for seed in seeds]
        lines.append("")
    cells = [
        [str(point.number), described(point.fields)]
        + [mean_cell(spread_of(point.metrics[name])) for name in names]
        for point in points
    ]
    return "\n".join([*lines, *table(["point", "fields", *names], cells)]) + "\n"


def draw(sweep: "Sweep", points: list[Ranked]) -> None:
    """Draws sweep.png: validation metrics by each swept field, a line where the others are equal.

    Raises:
      InputError: matplotlib is missing.
    """
    matplotlib = load_matplotlib()
    fields = list(dict.fromkeys(name for point in points for name in point.fields))
    if not fields:
        return
    # A point is at the config's own value of a field that it does not change.
    own = config_lib.flatten(sweep.config.to_dict())
    own = {name: own[name] for name in fields}
    points = [point._replace(fields=own | point.fields) for point in points]
    shown = metrics.in_tables()
    with matplotlib.rc_context({"font.size": 8}):
        size = (3.4 * len(fields), 0.4 + 2.2 * len(shown))
        page = matplotlib.figure.Figure(figsize=size, layout="constrained")
        rows = page.subplots(len(shown), len(fields), sharex="col", sharey="row", squeeze=False)
        for metric, axes in zip(shown, rows, strict=True):
            for ax, field in zip(axes, fields, strict=True):
                _panel(
                    ax, field, points, metric.key(sweep.config.eval_k[0]), legend=metric is shown[0]
                )
            axes[0].set_ylabel(f"validation {metric.heading(sweep.config.eval_k[0])}")
        for ax, field in zip(rows[-1], fields, strict=True):
            ax.set_xlabel(f"config.{field}")
        write_with(sweep.workdir / "sweep.png", partial(page.savefig, format="png", dpi=200))


def _panel(ax: Any, field: str, points: list[Ranked], metric: str, *, legend: bool) -> None:
    """One pair of axes of ``draw``."""
    values = sorted({_x(point.fields[field]) for point in points}, key=_order)
    numeric = all(isinstance(value, float) for value in values)
    place = {value: value if numeric else at for at, value in enumerate(values)}
    lines: dict[str, list[Ranked]] = {}
    for point in sorted(points, key=lambda point: point.number):
        others = {name: value for name, value in point.fields.items() if name != field}
        lines.setdefault(described(others), []).append(point)
    joined = any(len(line) > 1 for line in lines.values())
    for at, (label, line) in enumerate(lines.items()):
        line = sorted(line, key=lambda point: place[_x(point.fields[field])])
        spreads = [spread_of(point.metrics[metric]) for point in line]
        ax.errorbar(
            [place[_x(point.fields[field])] for point in line],
            [spread["mean"] for spread in spreads],
            [spread["std"] or 0.0 for spread in spreads],
            marker="os^Dv<>"[at % 7] if joined else "o",
            markersize=4,
            linewidth=1,
            capsize=2,
            color=None if joined else "C0",
            linestyle="-" if joined else "none",
            label=label,
        )
    if numeric:
        positive = [value for value in values if value > 0]
        # Spread over orders of magnitude: half of them in the lowest quarter.
        middle = positive[(len(positive) - 1) // 2] if positive else 0.0
        if len(positive) > 1 and min(values) >= 0 and 4 * middle < max(positive):
            ax.set_xscale("symlog", linthresh=min(positive))
        else:
            ax.locator_params(axis="x", nbins=5)
    else:
        ax.set_xticks(range(len(values)), [str(value) for value in values])
    if legend and joined and 1 < len(lines) <= 8:
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
        ax.legend(frameon=False, fontsize=7, ncols=2, **above)
    ax.grid(color="0.9", linewidth=0.5)
    ax.set_axisbelow(True)


def _x(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else str(value)


def _order(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value
