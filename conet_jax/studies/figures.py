"""Figures of the paper's Sec. 3.3 and 3.4 on any pair of domains, and their numbers.

Nothing here looks at a test item: every metric is that of the validation split, at the epoch with
the best validation NDCG where a field is swept. A run once trained is a line of points.jsonl in the
workdir, under a hash of all that it depends on: an interrupted command goes on, figures share runs,
and another config or other data makes new ones.
"""

import csv
import hashlib
import io
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

import conet_jax
from conet_jax import config as config_lib
from conet_jax import files
from conet_jax.data.load import load_dataset
from conet_jax.data.types import Dataset
from conet_jax.errors import InputError
from conet_jax.files import append_line, make_report_folder, write_text, write_with
from conet_jax.run import lock, loop
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state

Record = dict[str, Any]  # the numbers of an epoch

_LABELS = {"conet": "CoNet", "lasso": "CoNet-lasso"}
# Fields that do not change a run; the data counts by its hash.
_NAMES = ("name", "variant", "data", "on_nonfinite")
_WIDTH = 3.4  # inches, a column of a two-column page
_PANEL_HEIGHT = 1.5
_DPI = 200


class Panel(NamedTuple):
    """One pair of axes.

    Attributes:
      metric: of a ``Record``, with {k} for the cut.
      label: of the y axis.
      scale: of the y axis: "linear", "log" or "zero", linear from zero.
    """

    metric: str
    label: str
    scale: str = "linear"


class Figure(NamedTuple):
    """What a figure shows.

    Attributes:
      field: the config field on the x axis; "epoch" is every epoch of runs that do not stop early.
      label: of the x axis.
      panels: from above.
      values: of the field; none stand for every number of crossed layers.
      penalised: only methods with a lasso penalty have a line, as in the paper.
      penalties: (l1_method, factor on config.l1); each gives a line of its own.
    """

    field: str
    label: str
    panels: tuple[Panel, ...]
    values: tuple[float, ...] = ()
    penalised: bool = False
    penalties: tuple[tuple[str, float], ...] = ()


_QUALITY = (
    Panel("hit_ratio@{k}", "validation HR@{k}\n(best epoch)"),
    Panel("ndcg@{k}", "validation NDCG@{k}\n(best epoch)"),
)
_NEGATIVES = ("negatives", "sampled negatives per positive")
FIGURES = {
    # At alpha = 0 the target is not trained at all: chance, which would flatten the rest.
    "2a": Figure(
        "target_weight",
        r"target weight $\alpha$ (Eq. 7)",
        _QUALITY,
        values=tuple(i / 10 for i in range(1, 11)),
    ),
    "2b": Figure("cross_layers", "crossed layers, from the lowest", _QUALITY),
    "3a": Figure(
        "l1",
        r"lasso penalty $\lambda$ (Eq. 8)",
        _QUALITY,
        values=(0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        penalised=True,
    ),
    "3b": Figure(
        "epoch",
        "epoch",
        (
            Panel("train_loss", "training loss, target\n(nats per example)"),
            Panel("ndcg@{k}", "validation NDCG@{k}"),
        ),
    ),
    "3c": Figure(
        *_NEGATIVES,
        (Panel("seconds", "training time\n(seconds per epoch)", scale="zero"),),
        values=tuple(range(1, 11)),
        penalised=True,
    ),
    "3d": Figure(*_NEGATIVES, _QUALITY, values=tuple(range(1, 11)), penalised=True),
    "sparsity": Figure(
        "epoch",
        "epoch",
        (
            Panel("h_zeros", "exact zeros\n(share of entries of H)"),
            Panel("h_mean_abs", "mean |H|", scale="log"),
        ),
        penalised=True,
        # The paper's variant has the lambda that ranks best, at which few entries vanish for long.
        penalties=tuple((method, by) for method in ("subgradient", "proximal") for by in (1, 10)),
    ),
}


class Point(NamedTuple):
    """One run of a figure: its line, its place on the x axis (None: every epoch), its config."""

    line: str
    x: float | None
    config: ConfigDict


def points(name: str, methods: dict[str, ConfigDict], seeds: int) -> list[Point]:
    """Returns the runs of a figure, of seeds ``config.seed``, ``config.seed`` + 1, ….

    Args:
      name: a key of ``FIGURES``.
      methods: configs by the name of their line.
      seeds: runs a place.

    Raises:
      InputError: a config cannot be swept so, or a figure of the penalty finds none.
    """
    figure = FIGURES[name]
    lines = {
        method: config
        for method, config in methods.items()
        if config.l1 > 0 or not figure.penalised
    }
    if not lines:
        raise InputError(
            f"figure {name} is of methods with a lasso penalty, and {', '.join(methods)} have "
            "config.l1 = 0: add lasso to --methods, or set --config.l1"
        )
    if figure.penalties:
        lines = {
            f"{line} {method} {_scientific(by * config.l1)}": _changed(
                config, l1_method=method, l1=by * config.l1
            )
            for line, config in lines.items()
            for method, by in figure.penalties
        }
    found = []
    for line, config in lines.items():
        if config.model != "conet":
            raise InputError(
                f"the figures are of CoNet, and {line} has config.model={config.model}: expected "
                "--methods of conet, lasso and other variants of that model"
            )
        for seed in range(config.seed, config.seed + seeds):
            if figure.field == "epoch":
                fields = {"patience": config.epochs}
                found.append(Point(line, None, _changed(config, seed=seed, **fields)))
                continue
            for x in figure.values or range(len(config.layers)):
                found.append(Point(line, x, _changed(config, seed=seed, **{figure.field: x})))
    return found


def _scientific(x: float) -> str:
    return np.format_float_scientific(x, precision=3, trim="-", exp_digits=1)


def _changed(config: ConfigDict, **fields: Any) -> ConfigDict:
    config = ConfigDict(config.to_dict())
    config.update(fields)
    config_lib.validate(config)
    return config


def key(config: ConfigDict, digest: str) -> str:
    """Returns the hash of all that a run depends on: config, data (its hash), version."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _NAMES}
    content = json.dumps([fields, digest, conet_jax.__version__], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def run(config: ConfigDict, dataset: Dataset) -> list[Record]:
    """Trains once, without checkpoints, and returns the numbers of every epoch.

    Returns:
      For each epoch ``epoch``, ``train_loss`` (target, nats per example), the validation metrics,
      ``seconds`` of training, and the share of exact zeros ``h_zeros`` and the mean absolute value
      ``h_mean_abs`` of the entries under the penalty (of U and V if H is of low rank), None where
      nothing crosses.
    """
    experiment = make_experiment(config, dataset)
    records = []
    for end in loop.train(experiment, initial_state(experiment)):
        dense = end.params.dense
        mask = jax.tree.leaves(experiment.model.l1_mask(dense))
        masked = zip(jax.tree.leaves(dense), mask, strict=True)
        crossing = [np.ravel(leaf) for leaf, penalised in masked if penalised]
        h = np.abs(np.concatenate(crossing)) if crossing else None
        records.append(
            {
                "epoch": end.progress.epoch,
                "train_loss": end.row["train_loss"]["target"],
                **{metric: end.row["valid"][metric] for metric in _metrics(config)},
                "seconds": end.row["seconds"]["train"],
                "h_zeros": None if h is None else float((h == 0).mean()),
                "h_mean_abs": None if h is None else float(h.mean()),
            }
        )
    return records


def _metrics(config: ConfigDict) -> list[str]:
    return [f"{metric}@{config.eval_k}" for metric in ("hit_ratio", "ndcg", "mrr")]


def read_points(path: Path) -> dict[str, list[Record]]:
    """Returns the runs of a points.jsonl by key, and cuts off what a killed command left."""
    if not path.exists():
        return {}
    found, kept = {}, []
    try:
        with files.open_regular(path) as file:
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read as points ({error}); take it away, and they are made again"
        ) from None
    for line in lines:
        try:
            point = files.parse_json(line)
            if not (set(point) >= {"key", "epochs"} and _are_records(point["epochs"])):
                continue
            found[str(point["key"])] = point["epochs"]
        except (ValueError, TypeError, KeyError):
            continue
        kept.append(line)
    if len(kept) < len(lines):
        write_text(path, "".join(line + "\n" for line in kept))
    return found


def _are_records(epochs: Any) -> bool:
    names = ("epoch", "train_loss", "seconds")
    return bool(epochs) and all(type(row[name]) in (int, float) for row in epochs for name in names)


def rows(
    name: str, methods: dict[str, ConfigDict], dataset: Dataset, path: Path, seeds: int
) -> list[dict[str, Any]]:
    """Computes what is not yet in points.jsonl and returns a figure's numbers.

    Args:
      name: a key of ``FIGURES``.
      methods: configs by the name of their line.
      dataset: the data of all of them.
      path: points.jsonl.
      seeds: runs a place.

    Returns:
      {field: x, "method", "seed", numbers}: a row for each epoch or, where a field is swept, each
      run, with the numbers of its best epoch and, as ``seconds``, the median over its epochs but
      the first, which compiles.
    """
    field, table = FIGURES[name].field, []
    wanted = points(name, methods, seeds)
    done = read_points(path)
    for number, point in enumerate(wanted, 1):
        digest = key(point.config, dataset.meta["hash"])
        place = "" if point.x is None else f" {field}={point.x:g}"
        if digest not in done:
            began = time.perf_counter()
            done[digest] = run(point.config, dataset)
            append_line(
                path,
                {
                    "key": digest,
                    "point": f"{point.line}{place} seed={point.config.seed}",
                    "epochs": done[digest],
                },
            )
            print(
                f"figure {name}, run {number} of {len(wanted)}: {point.line}{place} seed="
                f"{point.config.seed}, {time.perf_counter() - began:.1f} s",
                flush=True,
            )
        epochs = done[digest]
        heading = {"method": point.line, "seed": point.config.seed}
        if point.x is None:
            table += [{"epoch": epoch["epoch"], **heading, **epoch} for epoch in epochs]
            continue
        best = max(epochs, key=lambda epoch: epoch[f"ndcg@{point.config.eval_k}"])
        seconds = float(np.median([epoch["seconds"] for epoch in epochs[1:] or epochs]))
        table.append({field: point.x, **heading, **best, "seconds": seconds})
    return table


def write(
    names: list[str],
    methods: dict[str, ConfigDict],
    workdir: str | Path,
    *,
    seeds: int = 3,
    dataset: Dataset | None = None,
) -> None:
    """Writes NAME.png, NAME.svg and NAME.csv of each figure to the workdir.

    Args:
      names: keys of ``FIGURES``.
      methods: configs by the name of their line; all of one data set.
      workdir: made if absent; holds points.jsonl.
      seeds: runs a place.
      dataset: the data; by default that of the first config.

    Raises:
      InputError: matplotlib is missing, the workdir cannot be written, a config is wrong.
    """
    load_matplotlib()
    for name in names:  # a wrong config shows before the first run
        points(name, methods, seeds)
    config = next(iter(methods.values()))
    dataset = load_dataset(config) if dataset is None else dataset
    workdir = Path(workdir)
    make_report_folder(workdir)
    with lock.owned(workdir):
        _write(names, methods, dataset, workdir, seeds)


def _write(
    names: list[str],
    methods: dict[str, ConfigDict],
    dataset: Dataset,
    workdir: Path,
    seeds: int,
) -> None:
    config = next(iter(methods.values()))
    for name in names:
        table = rows(name, methods, dataset, workdir / "points.jsonl", seeds)
        text = io.StringIO()
        writer = csv.DictWriter(text, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        write_text(workdir / f"{name}.csv", text.getvalue())
        seen = f"{config.name}, mean ± std of {seeds} seeds" if seeds > 1 else config.name
        draw(name, table, workdir / name, k=config.eval_k, title=seen)
        print(f"figure {name}: {workdir / name}.png, .svg, .csv", flush=True)


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


def draw(name: str, table: list[dict[str, Any]], path: Path, *, k: int, title: str) -> None:
    """Draws a figure from its numbers, a band for the standard deviation over seeds.

    Args:
      name: a key of ``FIGURES``.
      table: from ``rows``.
      path: without suffix; .png and .svg are written.
      k: the metrics' cut.
      title: of the legend.
    """
    matplotlib = load_matplotlib()
    figure = FIGURES[name]
    lines = list(dict.fromkeys(row["method"] for row in table))
    # Lines differ by marker and dash too: colours may be printed in grey.
    styles = list(
        zip(("k", "C3", "C0", "C2"), ("o", "s", "^", "D"), ("-", "--", "-.", ":"), strict=True)
    )
    style = {
        "font.size": 8,
        "legend.title_fontsize": 7,
        "svg.hashsalt": name,  # the same numbers give the same file
    }
    labels = [_label(line) for line in lines]
    columns = 2 if max(map(len, labels)) < 15 else 1
    with matplotlib.rc_context(style):
        legend = 0.2 + 0.15 * -(-len(lines) // columns)
        height = 0.4 + legend + _PANEL_HEIGHT * len(figure.panels)
        # A figure without pyplot draws by Agg, whatever the display.
        page = matplotlib.figure.Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = page.subplots(len(figure.panels), sharex=True, squeeze=False)[:, 0]
        for ax, panel in zip(axes, figure.panels, strict=True):
            metric = panel.metric.format(k=k)
            for at, line in enumerate(lines):
                colour, marker, dashes = styles[at % len(styles)]
                xs, mean, std = _band(table, line, figure.field, metric)
                step = max(1, len(xs) // 10)
                ax.plot(
                    xs,
                    mean,
                    color=colour,
                    marker=marker,
                    linestyle=dashes,
                    linewidth=1.2,
                    markersize=3.5,
                    # Some ten marks a line, at other places on each.
                    markevery=(at % step, step),
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
            ax.set_ylabel(panel.label.format(k=k))
            ax.grid(color="0.9", linewidth=0.5)
            ax.set_axisbelow(True)
            if panel.scale == "log" and any((row[metric] or 0) > 0 for row in table):
                ax.set_yscale("log", nonpositive="mask")
            elif panel.scale == "zero":
                ax.set_ylim(bottom=0)
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
