"""Sweeps: a grid, or draws, over config fields, with several seeds, valued on validation alone.

A point is what it changes of the config; a run is a point with a seed. ``runner`` trains them and
keeps their records in the workdir, so the same call again goes on where it was, and a wider grid
keeps what is done.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from conet_jax import config as config_lib
from conet_jax import models
from conet_jax.data.types import Dataset
from conet_jax.errors import InputError
from conet_jax.files import csv_text, make_report_folder, write_text
from conet_jax.run import lock
from conet_jax.run.epoch import FIRST_STEPS
from conet_jax.run.tune import searching_once
from conet_jax.studies import runner, search, sweep_report
from conet_jax.studies.points import Point, described
from conet_jax.studies.runner import Datasets, Record


class Sweep(NamedTuple):
    """What is swept.

    Attributes:
      file: config file with its variant, configs/NAME.py:variant.
      config: its config under ``given``.
      given: config fields of the command line by dotted name; they hold for every point.
      workdir: folder of all that is written.
      points: config fields of each point by dotted name.
      seeds: runs a point, of seeds ``config.seed``, ``config.seed`` + 1, ….
      members: most runs of a population: bounds its memory.
      jobs: processes that share populations and runs.
    """

    file: str
    config: ConfigDict
    given: dict[str, Any]
    workdir: Path
    points: list[Point]
    seeds: int = 1
    members: int = 32
    jobs: int = 1


class Entry(NamedTuple):
    """A row of sweep.csv: its point's number, seed and config, and its run.

    ``problem`` says why the config cannot be run, then ``run`` is None.
    """

    point: int
    seed: int
    config: ConfigDict
    run: runner.Run | None
    problem: str = ""


def entries(sweep: Sweep, datasets: Datasets) -> list[Entry]:
    """Returns the runs of every point by seed; of a closed form, which has no seed, one.

    Raises:
      InputError: the points are ranked on different held-out items.
    """
    found, common = [], None
    for number, point in enumerate(sweep.points):
        first = sweep.config.seed
        for seed in range(first, first + sweep.seeds):
            config = ConfigDict(sweep.config.to_dict())
            try:
                config.update_from_flattened_dict({**point, "seed": seed})
                config_lib.validate(config)
                if config.on_nonfinite != "stop":
                    raise InputError(
                        f"config.on_nonfinite is {config.on_nonfinite!r}: expected stop in a "
                        "sweep, where a run that diverges is a row and the others go on"
                    )
                dataset = datasets.of(config)
            except (InputError, TypeError) as error:
                found.append(Entry(number, seed, config, None, str(error)))
                break
            held_out = dataset.valid
            common = common or held_out
            if held_out is not common and not all(map(np.array_equal, common, held_out)):
                raise InputError(
                    f"point {number} ({described(point)}) has other validation items than the "
                    "points before, and their metrics do not compare: sweep each data set apart"
                )
            run = runner.plan(config, dataset, sweep.workdir)
            found.append(Entry(number, seed, config, run))
            if models.build(config).closed_form:
                break
    return found


@searching_once()
def run(sweep: Sweep, dataset: Dataset | None = None) -> list[Record]:
    """Does what is left to do and writes sweep.csv, sweep.md and, with matplotlib, sweep.png.

    Args:
      sweep: what is swept.
      dataset: the data of every point; by default what the configs say. Then one process.

    Returns:
      The rows of sweep.csv.

    Raises:
      InputError: nothing can be run, all runs failed, or the workdir cannot be written.
    """
    datasets = Datasets(dataset)
    planned = entries(sweep, datasets)
    if all(entry.problem for entry in planned):
        raise InputError(planned[0].problem)
    for problem in dict.fromkeys(entry.problem for entry in planned if entry.problem):
        print(f"cannot be run, and is left out: {problem}", file=sys.stderr, flush=True)
    make_report_folder(sweep.workdir)
    with lock.owned(sweep.workdir):
        return _run(sweep, planned, datasets)


def _run(sweep: Sweep, planned: list[Entry], datasets: Datasets) -> list[Record]:
    def begin(todo: list[runner.Unit]) -> None:
        left = sum(len(unit.runs) for unit in todo)
        print(
            f"{len(sweep.points)} points, {len(planned)} runs, {left} of them to do, in "
            f"{len(todo)} {'program' if len(todo) == 1 else 'programs'}; writing to "
            f"{sweep.workdir}",
            flush=True,
        )

    outcome = runner.run(
        [entry.run for entry in planned if entry.run is not None],
        sweep.workdir,
        datasets,
        members=sweep.members,
        jobs=sweep.jobs,
        begin=begin,
    )
    records = [_record(entry, outcome) for entry in planned]
    rows = [_row(sweep, *both) for both in zip(planned, records, strict=True)]
    write_text(sweep.workdir / "sweep.csv", csv_text(rows))
    ranked = sweep_report.ranked(sweep, rows, records)
    text = sweep_report.markdown(sweep, rows, ranked)
    write_text(sweep.workdir / "sweep.md", text)
    print(text)
    for row in rows:
        if row["failed"]:
            print(f"failed: point {row['point']} seed {row['seed']}: {row['failed']}", flush=True)
    try:
        sweep_report.draw(sweep, ranked)
    except InputError as error:
        print(f"no sweep.png: {error}", file=sys.stderr)
    outcome.complete(", with fewer --members in less memory")
    if not ranked:
        raise InputError(f"no point without a failed run; see {sweep.workdir / 'sweep.csv'}")
    return rows


def _record(entry: Entry, outcome: runner.Outcome) -> Record:
    """The record of a run; of one that has none ``failed``, the reason."""
    if entry.run is None:
        return {"failed": entry.problem}
    key = entry.run.key
    return outcome.records.get(key) or {"failed": outcome.unfinished[key]}


def _row(sweep: Sweep, entry: Entry, record: Record) -> Record:
    """A row of sweep.csv; every row has the same columns."""
    fields = dict.fromkeys(name for point in sweep.points for name in point)
    swept = config_lib.flatten(entry.config.to_dict())
    row = {"point": entry.point, "seed": entry.seed}
    row |= {f"config.{name}": swept[name] for name in fields}
    row |= search.columns(record, sweep.config.eval_k[0])
    row |= {name: record.get(name) for name in ("best_epoch", "epochs", "seconds")}
    losses = record.get("first_losses", {}).get("target", [])
    for step in range(FIRST_STEPS):
        row[f"target_loss_step_{step + 1}"] = losses[step] if step < len(losses) else None
    return row | {"failed": record.get("failed", "")}
