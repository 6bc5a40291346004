"""Pictures of a transfer report, as SVG that takes its colours from the page around it."""

import io
import re
from typing import Any

import numpy as np

from conet_jax.studies.drawing import load_matplotlib
from conet_jax.studies.verdict import GROUP_USERS

_WIDTH = 5.2  # inches at 10 points: legible on 400 pixels, too
# What matplotlib draws in, and the colour of the page that it stands for.
_COLOURS = {
    "#010203": "currentColor",
    "#010204": "var(--line)",
    "#010205": "var(--one)",
    "#010206": "var(--two)",
    "#010207": "var(--three)",
}
_INK, _LINE, _ONE, _TWO, _THREE = _COLOURS
_STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def methods(rows: list[dict[str, Any]], baseline: str) -> str:
    """Draws every method's gain over the baseline, with its interval.

    Args:
      rows: "methods" of the report.
      baseline: what they are compared with.
    """
    rows = [row for row in rows if row["gain"] and row["gain"]["gain"] is not None]
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": "methods"}):
        size = (_WIDTH, 0.7 + 0.3 * max(1, len(rows)))
        page = matplotlib.figure.Figure(figsize=size, layout="constrained")
        ax = page.subplots()
        for at, row in enumerate(reversed(rows)):
            colour = _ONE if row["knows_source"] else _THREE
            _interval(ax, row["gain"], at, colour, across=True)
        ax.set_yticks(range(len(rows)), [row["method"] for row in reversed(rows)])
        ax.axvline(0, color=_INK, linewidth=0.8)
        ax.set_xlabel(f"gain over {baseline} (%)")
        ax.grid(axis="x", color=_LINE, linewidth=0.5)
        ax.set_axisbelow(True)
        return _svg(page, "m", f"Gain of each method over {baseline}, with 95% intervals")


def groups(found: dict[str, Any], names: dict[str, str]) -> str:
    """Draws the gain by a user's number of target and of source interactions.

    Args:
      found: "groups" of the report.
      names: of the domains.
    """
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": "groups"}):
        page = matplotlib.figure.Figure(figsize=(_WIDTH, 5.0), layout="constrained")
        axes = page.subplots(2, sharey=True)
        for ax, domain, colour in zip(axes, ("target", "source"), (_ONE, _TWO), strict=True):
            rows = [row for row in found[domain] if row["gain"]["gain"] is not None]
            for at, row in enumerate(rows):
                few = row["users"] < GROUP_USERS
                _interval(ax, row["gain"], at, _THREE if few else colour)
            labels = [f"{row['interactions']}\n{row['users']:,}" for row in rows]
            ax.set_xticks(range(len(rows)), labels)
            ax.set_xlabel(f"training interactions of {names[domain]}; users below")
            ax.axhline(0, color=_INK, linewidth=0.8)
            ax.set_ylabel("gain (%)")
            ax.grid(axis="y", color=_LINE, linewidth=0.5)
            ax.set_axisbelow(True)
        middle = [
            row["gain"]
            for domain in ("target", "source")
            for row in found[domain]
            if row["users"] >= GROUP_USERS and row["gain"]["gain"] is not None
        ]
        if middle:  # groups of a few users must not flatten the others
            low = min(0.0, *(100 * gain["low"] for gain in middle))
            high = max(0.0, *(100 * gain["high"] for gain in middle))
            room = 0.08 * (high - low) + 0.5
            axes[0].set_ylim(low - room, high + room)
        return _svg(page, "g", "Gain by number of interactions, with 95% intervals")


def matrices(rows: list[dict[str, Any]]) -> str:
    """Draws each H as a heat map.

    Args:
      rows: "matrices" of the report.
    """
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": "matrices"}):
        shown = rows[:4]
        size = (_WIDTH, 0.7 + 4.6 / len(shown))
        page = matplotlib.figure.Figure(figsize=size, layout="constrained")
        axes = page.subplots(1, len(shown), squeeze=False)[0]
        for level, (ax, row) in enumerate(zip(axes, shown, strict=True), 1):
            values = np.array(row["values"])
            ax.imshow(_tinted(values), interpolation="nearest", aspect="auto")
            ax.set_title(f"H of layer {level}\n{row['shape'][0]} × {row['shape'][1]}", fontsize=9)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[["top", "right"]].set_visible(True)
        return _svg(page, "h", "Heat maps of the cross connections")


def _tinted(values: np.ndarray) -> np.ndarray:
    """Blue for positive, orange for negative, clearer the nearer to zero: on any background."""
    scale = np.quantile(np.abs(values), 0.99) or 1.0
    strength = np.clip(np.abs(values) / scale, 0, 1)[..., None]
    blue, orange = np.array([0.25, 0.55, 0.85]), np.array([0.9, 0.5, 0.2])
    colour = np.where(values[..., None] > 0, blue[None, None, :], orange[None, None, :])
    return np.concatenate([colour, strength], axis=-1)


def _interval(ax: Any, gain: dict[str, Any], at: int, colour: str, *, across: bool = False) -> None:
    """A dot and a line from ``low`` to ``high``, in percent."""
    low, middle, high = (100 * gain[name] for name in ("low", "gain", "high"))
    line = ([low, high], [at, at]) if across else ([at, at], [low, high])
    dot = ([middle], [at]) if across else ([at], [middle])
    ax.plot(*line, color=colour, linewidth=2)
    ax.plot(*dot, color=colour, marker="o", markersize=5)


def _svg(page: Any, prefix: str, label: str) -> str:
    """The picture as an element of a page: no prologue, own ids, colours of the page."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    page.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:width|height|xmlns:xlink|xmlns|version)="[^"]*"', "", svg, count=5)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    for drawn, shown in _COLOURS.items():
        svg = svg.replace(drawn, shown)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()
