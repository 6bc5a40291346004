"""A picture of one run, by epoch: losses, validation, and the cross connections."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from conet_jax import files
from conet_jax.files import write_with
from conet_jax.studies.drawing import load_matplotlib
from conet_jax.studies.evidence import cut

_STYLES = (("C0", "-"), ("C1", "--"), ("C2", "-."), ("C4", ":"))
Lines = dict[str, list[float | None]]


def panels(rows: list[dict[str, Any]]) -> dict[str, Lines]:
    """Returns what there is to draw: lines, a value an epoch, by the label of their axis.

    Args:
      rows: of metrics.jsonl.

    Example:
      >>> row = {"train_loss": {"target": 0.5}, "valid_warm": {"ndcg@5": 0.2}}
      >>> panels([row])["validation NDCG@5"]
      {'warm': [0.2]}
    """
    found: dict[str, Lines] = {}

    def add(panel: str, line: str, values: list[float | None]) -> None:
        if any(value is not None for value in values):
            found.setdefault(panel, {})[line] = values

    for domain in ("target", "source"):
        losses = [row.get("train_loss", {}).get(domain) for row in rows]
        add("training loss\n(nats per example)", domain, losses)
    k = cut(rows[0]["valid_warm"])
    for part, line in (("valid_warm", "warm"), ("valid", "all")):
        values = [row.get(part, {}).get(f"ndcg@{k}") for row in rows]
        add(f"validation NDCG@{k}", line, values)
    for prefix, panel in (("h_mean_abs/", "mean |H|"), ("h_zeros/", "exact zeros of H\n(share)")):
        names = [name for name in rows[0].get("diagnostics", {}) if name.startswith(prefix)]
        for name in names:
            values = [row["diagnostics"].get(name) for row in rows]
            add(panel, name.removeprefix(prefix).replace("_", " "), values)
    return found


def draw(workdir: Path) -> Path | None:
    """Draws WORKDIR/curves.svg from WORKDIR/metrics.jsonl.

    Returns:
      The file; None of a run of one epoch, which has no curve.

    Raises:
      InputError: matplotlib is not installed.
    """
    matplotlib = load_matplotlib()
    with files.open_regular(workdir / "metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    if len(rows) < 2:
        return None
    shown = panels(rows)
    path = workdir / "curves.svg"
    with matplotlib.rc_context({"font.size": 8, "svg.hashsalt": path.name}):
        size = (4.5, 0.4 + 1.5 * len(shown))
        page = matplotlib.figure.Figure(figsize=size, layout="constrained")
        axes = page.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
        epochs = [row["epoch"] for row in rows]
        for ax, (label, lines) in zip(axes, shown.items(), strict=True):
            for at, (name, values) in enumerate(lines.items()):
                colour, dashes = _STYLES[at % len(_STYLES)]
                drawn = [float("nan") if value is None else value for value in values]
                ax.plot(epochs, drawn, color=colour, linestyle=dashes, label=name)
            ax.set_ylabel(label)
            ax.grid(color="0.9", linewidth=0.5)
            ax.legend(frameon=False, fontsize=7)
        axes[-1].set_xlabel("epoch")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        write_with(path, partial(page.savefig, format="svg", metadata={"Date": None}))
    return path
