"""Figures of the paper's Sec. 3.3 and 3.4 on any pair of domains, and their numbers.

Nothing here looks at a test item: every metric is that of the validation split, at the epoch with
the best validation NDCG where a field is swept. ``runner`` trains what is left to do, as
populations, and keeps its records in the workdir: an interrupted command goes on, figures share
runs, and another config or other data makes new ones.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from conet_jax import config as config_lib
from conet_jax import metrics
from conet_jax.data.load import load_dataset
from conet_jax.data.types import Dataset
from conet_jax.errors import InputError
from conet_jax.files import csv_text, make_report_folder, write_text
from conet_jax.run import lock
from conet_jax.studies import runner, search
from conet_jax.studies.drawing import Figure, Panel, draw, load_matplotlib
from conet_jax.studies.runner import Datasets, Record

# Records of runs that are trained one at a time.
TIMED = runner.VALIDATION._replace(name="timed")


def _quality(k: int) -> list[Panel]:
    return [
        Panel(f"warm {metric.key(k)}", f"warm validation {metric.heading(k)}\n(best epoch)")
        for metric in metrics.in_tables()
    ]


_NEGATIVES = ("negatives", "sampled negatives per positive")
FIGURES = {
    # At alpha = 0 the target is not trained at all: chance, which would flatten the rest.
    "2a": Figure(
        "target_weight",
        r"target weight $\alpha$ (Eq. 7)",
        _quality,
        values=tuple(i / 10 for i in range(1, 11)),
    ),
    "2b": Figure("cross_layers", "crossed layers, from the lowest", _quality),
    "3a": Figure(
        "l1",
        r"lasso penalty $\lambda$ (Eq. 8)",
        _quality,
        values=(0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        penalised=True,
    ),
    "3b": Figure(
        "epoch",
        "epoch",
        lambda k: [
            Panel("train_loss", "training loss, target\n(nats per example)"),
            Panel(f"warm ndcg@{k}", f"warm validation NDCG@{k}"),
        ],
    ),
    "3c": Figure(
        *_NEGATIVES,
        lambda k: [Panel("seconds", "training time\n(seconds per epoch)", scale="zero")],
        values=tuple(range(1, 11)),
        penalised=True,
        timed=True,
    ),
    # Timed so that it shares the runs of 3c.
    "3d": Figure(*_NEGATIVES, _quality, values=tuple(range(1, 11)), penalised=True, timed=True),
    "sparsity": Figure(
        "epoch",
        "epoch",
        lambda k: [
            Panel("h_zeros", "exact zeros\n(share of entries of H)"),
            Panel("h_mean_abs", "mean |H|", scale="log"),
        ],
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

    def name(self, field: str) -> str:
        """Returns what it is called where it is told about."""
        place = "" if self.x is None else f" {field}={self.x:g}"
        return f"{self.line}{place} seed={self.config.seed}"


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


class Planned(NamedTuple):
    """The points of a figure and their runs."""

    points: list[Point]
    runs: list[runner.Run]


def plan(
    name: str, methods: dict[str, ConfigDict], dataset: Dataset, workdir: Path, seeds: int
) -> Planned:
    """Returns the points of a figure, see ``points``, and their runs."""
    found = points(name, methods, seeds)
    kind = TIMED if FIGURES[name].timed else runner.VALIDATION
    return Planned(found, [runner.plan(point.config, dataset, workdir, kind) for point in found])


def train(planned: dict[str, Planned], dataset: Dataset, workdir: Path) -> dict[str, Record]:
    """Trains what has no record yet, for all figures together; returns the records by key.

    Raises:
      InputError: a run failed.
    """
    records: dict[str, Record] = {}
    names = {
        run.key: f"figure {name}, run {number} of {len(runs)}: {point.name(FIGURES[name].field)}"
        for name, (points, runs) in reversed(planned.items())
        for number, (point, run) in enumerate(zip(points, runs, strict=True), 1)
    }

    def done(run: runner.Run, record: Record) -> None:
        print(f"{names[run.key]}, {record.get('seconds', 0.0):.1f} s", flush=True)

    for kind, timed, members in ((runner.VALIDATION, False, 32), (TIMED, True, 1)):
        runs = [
            run for name in planned for run in planned[name].runs if FIGURES[name].timed == timed
        ]
        outcome = runner.run(runs, workdir, Datasets(dataset), kind, members=members, done=done)
        records |= outcome.complete()
    for run_key, record in records.items():
        if "failed" in record:
            raise InputError(f"{names[run_key]} failed: {record['failed']}")
    return records


def rows(name: str, planned: Planned, records: dict[str, Record]) -> list[dict[str, Any]]:
    """Returns a figure's numbers.

    Args:
      name: a key of ``FIGURES``.
      planned: its points and runs.
      records: by key.

    Returns:
      {field: x, "method", "seed", numbers}: a row for each epoch or, where a field is swept, each
      run, with the numbers of its best epoch and, as ``seconds``, the median over its epochs but
      the first, which compiles; of runs side by side a run's share.
    """
    field, table = FIGURES[name].field, []
    for point, run in zip(planned.points, planned.runs, strict=True):
        k, history = point.config.eval_k[0], records[run.key]["history"]
        heading = {"method": point.line, "seed": point.config.seed}
        numbers = [_numbers(epoch, k) for epoch in history]
        if point.x is None:
            table += [{"epoch": epoch["epoch"], **heading, **epoch} for epoch in numbers]
            continue
        values = [search.value_of(epoch, k) for epoch in history]
        best = numbers[int(np.argmax(values))]  # the first of equals
        seconds = float(np.median([epoch["seconds"] for epoch in history[1:] or history]))
        table.append({field: point.x, **heading, **best, "seconds": seconds})
    return table


def _numbers(epoch: Record, k: int) -> dict[str, Any]:
    """An epoch of ``population.epoch_numbers`` as columns."""
    return {
        "epoch": epoch["epoch"],
        "train_loss": epoch["train_loss"],
        **search.columns(epoch, k),
        **{name: epoch[name] for name in ("seconds", "h_zeros", "h_mean_abs")},
    }


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
      workdir: made if absent; holds the records of the runs.
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
    planned = {name: plan(name, methods, dataset, workdir, seeds) for name in names}
    seen = f"{config.name}, mean ± std of {seeds} seeds" if seeds > 1 else config.name
    with lock.owned(workdir):
        records = train(planned, dataset, workdir)
        for name in names:
            table = rows(name, planned[name], records)
            write_text(workdir / f"{name}.csv", csv_text(table))
            draw(FIGURES[name], table, workdir / name, k=config.eval_k[0], title=seen)
            print(f"figure {name}: {workdir / name}.png, .svg, .csv", flush=True)
