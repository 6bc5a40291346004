"""Draws figures: lines of means over seeds with a band for their standard deviation."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conet_jax.errors import InputError
from conet_jax.files import write_with

_LABELS = {"conet": "CoNet", "lasso": "CoNet-lasso"}
_WIDTH = 3.4  # inches, a column of a two-column page
_PANEL_HEIGHT = 1.5
_DPI = 200
# Lines differ by marker and dash too: colours may be printed in grey.
_STYLES = (("k", "o", "-"), ("C3", "s", "--"), ("C0", "^", "-."), ("C2", "D", ":"))


class Panel(NamedTuple):
    """One pair of axes.

    Attributes:
      column: of the numbers.
      label: of the y axis.
      scale: of the y axis: "linear", "log" or "zero", linear from zero.
    """

    column: str
    label: str
    scale: str = "linear"


class Figure(NamedTuple):
    """What a figure shows.

    Attributes:
      field: the config field on the x axis; "epoch" is every epoch of runs that do not stop early.
      label: of the x axis.
      panels: from above, of the metrics' cut.
      values: of the field; none stand for every number of crossed layers.
      penalised: only methods with a lasso penalty have a line, as in the paper.
      penalties: (l1_method, factor on config.l1); each gives a line of its own.
      timed: its runs are trained one at a time, so that their seconds are their own.
    """

    field: str
    label: str
    panels: Callable[[int], list[Panel]]
    values: tuple[float, ...] = ()
    penalised: bool = False
    penalties: tuple[tuple[str, float], ...] = ()
    timed: bool = False


def load_matplotlib() -> Any:
    """Returns ``matplotlib`` with ``matplotlib.figure``.

    Raises:
      InputError: it is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        raise InputError('figures need matplotlib: pip install "conet-jax[plots]"') from None
    return matplotlib


def draw(figure: Figure, table: list[dict[str, Any]], path: Path, *, k: int, title: str) -> None:
    """Draws a figure from its numbers.

    Args:
      figure: what it shows.
      table: a row for each place and seed of a line: "method", "seed", ``figure.field``, numbers.
      path: without suffix; .png and .svg are written.
      k: the metrics' cut.
      title: of the legend.
    """
    matplotlib = load_matplotlib()
    panels = figure.panels(k)
    lines = list(dict.fromkeys(row["method"] for row in table))
    labels = [_label(line) for line in lines]
    columns = 2 if max(map(len, labels)) < 15 else 1
    style = {
        "font.size": 8,
        "legend.title_fontsize": 7,
        "svg.hashsalt": path.name,  # the same numbers give the same file
    }
    with matplotlib.rc_context(style):
        legend = 0.2 + 0.15 * -(-len(lines) // columns)
        height = 0.4 + legend + _PANEL_HEIGHT * len(panels)
        # A figure without pyplot draws by Agg, whatever the display.
        page = matplotlib.figure.Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = page.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for ax, panel in zip(axes, panels, strict=True):
            _draw_panel(ax, panel, figure.field, table, lines)
        if figure.field == "l1":
            least = min(x for x in figure.values if x > 0)
            axes[-1].set_xscale("symlog", linthresh=least)
            axes[-1].set_xticks([0, *(10.0**i for i in range(-6, 1, 2))])
        else:
            axes[-1].xaxis.get_major_locator().set_params(integer=figure.field != "target_weight")
        axes[-1].set_xlabel(figure.label)
        page.legend(
            axes[0].get_lines(),
            labels,
            loc="outside upper center",
            ncols=columns,
            title=title,
            frameon=False,
            handlelength=3,
        )
        for suffix, extra in (("png", {"dpi": _DPI}), ("svg", {"metadata": {"Date": None}})):
            write_with(
                path.with_name(f"{path.name}.{suffix}"),
                partial(page.savefig, format=suffix, **extra),
            )


def _draw_panel(
    ax: Any, panel: Panel, field: str, table: list[dict[str, Any]], lines: list[str]
) -> None:
    """Draws the lines of one pair of axes."""
    for at, line in enumerate(lines):
        colour, marker, dashes = _STYLES[at % len(_STYLES)]
        xs, mean, std = _band(table, line, field, panel.column)
        step = max(1, len(xs) // 10)
        ax.plot(
            xs,
            mean,
            color=colour,
            marker=marker,
            linestyle=dashes,
            linewidth=1.2,
            markersize=3.5,
            markevery=(at % step, step),  # some ten marks a line, at other places on each
        )
        low = mean - std
        if panel.scale == "log":  # a band has no end below zero on a log axis
            low = np.maximum(low, mean / 10)
        ax.fill_between(
            xs,
            low,
            mean + std,
            facecolor=(colour, 0.12),
            edgecolor=(colour, 0.6),
            linestyle=dashes,
            linewidth=0.4,
        )
    ax.set_ylabel(panel.label)
    ax.grid(color="0.9", linewidth=0.5)
    ax.set_axisbelow(True)
    if panel.scale == "log" and any((row[panel.column] or 0) > 0 for row in table):
        ax.set_yscale("log", nonpositive="mask")
    elif panel.scale == "zero":
        ax.set_ylim(bottom=0)


def _label(line: str) -> str:
    method, *penalty = line.split()
    label = _LABELS.get(method, method)
    return label + (rf", {penalty[0]}, $\lambda$ = {penalty[1]}" if penalty else "")


def _band(
    table: list[dict[str, Any]], line: str, field: str, metric: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, mean over seeds, standard deviation over seeds) of one line."""
    values: dict[float, list[float | None]] = {}
    for row in table:
        if row["method"] == line:
            values.setdefault(row[field], []).append(row[metric])
    xs = sorted(values)
    by_x = [np.array(values[x], np.float64) for x in xs]  # None is NaN, a gap in the line
    std = [seeds.std(ddof=1) if len(seeds) > 1 else 0.0 for seeds in by_x]
    return np.array(xs), np.array([seeds.mean() for seeds in by_x]), np.array(std)
