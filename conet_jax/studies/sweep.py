"""Sweeps: a grid, or draws, over config fields, with several seeds, valued on validation alone.

Runs that differ in real-valued fields (``models.base.Hyper``) and seed alone are one population in
one program; the others follow one another, or share ``jobs`` processes. What stands in the workdir
is all there is to go on from: ``results/KEY.json``, a run that is done, written by rename under a
hash of all that it depends on, and ``populations/``, those in training. The same call again goes on
where it was; a wider grid keeps what is done.
"""

import csv
import difflib
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Container, Sequence
from concurrent import futures
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import tuple_parser

from conet_jax import config as config_lib
from conet_jax import files, models
from conet_jax.data.load import load_dataset
from conet_jax.data.types import Dataset
from conet_jax.errors import InputError
from conet_jax.files import make_folder, make_report_folder, write_json, write_text, write_with
from conet_jax.models.base import FittedModel, Model
from conet_jax.run import lock
from conet_jax.run.epoch import FIRST_STEPS
from conet_jax.studies import figures, population, search, table2, tables
from conet_jax.studies.population import Record

Overrides = dict[str, Any]

# The parsers of launch/train.py: a value means the same here and there.
_PARSERS = {
    float: flags.FloatParser(),
    bool: flags.BooleanParser(),
    tuple: tuple_parser.TupleParser(),
    int: flags.IntegerParser(),
    str: flags.ArgumentParser(),
}
_DRAWN = re.compile(r"(log|uniform)\(([^,]+),([^,]+)\)")


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
    points: list[Overrides]
    seeds: int = 1
    members: int = 32
    jobs: int = 1


class Run(NamedTuple):
    """One run: its point's number, seed and config, and the key of its result.

    ``problem`` says why the config cannot be run, then ``key`` is empty.
    """

    point: int
    seed: int
    config: ConfigDict
    key: str
    problem: str = ""


class Unit(NamedTuple):
    """Runs that are trained together, and the folder of a population's checkpoints."""

    configs: list[ConfigDict]
    keys: list[str]
    folder: Path


# The points.


def parse_grid(texts: Sequence[str], config: ConfigDict) -> list[Overrides]:
    """Returns the points of a grid.

    Args:
      texts: ``config.FIELD=VALUE,VALUE…`` each; a tuple is written in brackets.
      config: whose fields they are.

    Raises:
      InputError: there is no such field, or a value is of another type.

    Example:
      >>> parse_grid(["config.l1=0,1e-6", "config.negatives=4"], config_lib.default_config())
      [{'l1': 0.0, 'negatives': 4}, {'l1': 1e-06, 'negatives': 4}]
    """
    fields: dict[str, str] = {}
    for text in texts:
        name, values = _field(text, config)
        fields[_once(name, fields)] = values
    values = [
        [_value(text, name, config) for text in _split(texts)] for name, texts in fields.items()
    ]
    for name, several in zip(fields, values, strict=True):
        twice = [value for at, value in enumerate(several) if value in several[:at]]
        if twice:
            raise InputError(f"config.{name} has the value {twice[0]!r} twice: expected each once")
    return [dict(zip(fields, point, strict=True)) for point in itertools.product(*values)]


def parse_space(texts: Sequence[str], config: ConfigDict) -> search.Space:
    """Returns the space of a random search.

    Args:
      texts: ``config.FIELD=log(LOW,HIGH)``, ``=uniform(LOW,HIGH)`` or ``=VALUE,VALUE…`` each; or
        ``default`` alone, the space that launch/table2.py has for the config's variant.
      config: whose fields they are.

    Raises:
      InputError: there is no such field or space, or a value is of another type.

    Example:
      >>> parse_space(["config.l1=log(1e-6,1e-4)"], config_lib.default_config())
      {'l1': Range(low=1e-06, high=0.0001, log=True)}
    """
    if list(texts) == ["default"]:
        space = search.SPACES.get(config.variant)
        if not space:
            raise InputError(
                f"--space=default: the variant {config.variant!r} has no space of its own; write "
                "--space='config.FIELD=log(LOW,HIGH)'"
            )
        return space
    space: search.Space = {}
    for text in texts:
        name, values = _field(text, config)
        _once(name, space)
        drawn = _DRAWN.fullmatch(values)
        if drawn is None:
            space[name] = tuple(_value(text, name, config) for text in _split(values))
            continue
        kind, *bounds = drawn.groups()
        low, high = (_value(bound, name, config) for bound in bounds)
        fits = isinstance(low, float) and -math.inf < low < high < math.inf
        if not fits or (kind == "log" and low <= 0):
            raise InputError(
                f"--space={text}: expected a real-valued field and LOW < HIGH, with log 0 < LOW; "
                "choices are written VALUE,VALUE"
            )
        space[name] = search.Range(low, high, log=kind == "log")
    return space


def _field(text: str, config: ConfigDict) -> tuple[str, str]:
    name, equals, values = text.partition("=")
    name = name.strip().removeprefix("config.")
    if not (equals and name):
        raise InputError(f"{text!r} is no field with values: expected config.FIELD=VALUE,VALUE")
    check_field(name, config)
    return name, values


def _once(name: str, given: Container[str]) -> str:
    if name in given:
        raise InputError(f"config.{name} is given twice: write its values after one =, by commas")
    return name


def check_field(name: str, config: ConfigDict) -> None:
    """Raises ``InputError`` where a config has no field of that dotted name to sweep."""
    known = config_lib.flatten(config.to_dict())
    if name in ("seed", "variant", "name", "eval_k"):
        other = {
            "seed": "--seeds is for it",
            "name": "it names folders alone",
            "eval_k": "metrics of different cuts do not compare",
        }
        raise InputError(
            f"config.{name} cannot be swept: "
            + other.get(name, "take launch/table2.py --methods, or a sweep a variant")
        )
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean config.{near[0]}?" if near else ""
        raise InputError(
            f"unknown config field config.{name}{hint or '; conet_jax/config.py lists them'}"
        )


def _split(text: str) -> list[str]:
    """Splits at the commas outside brackets.

    >>> _split("(64, 32),(32,16)")
    ['(64, 32)', '(32,16)']
    """
    return [part.strip() for part in re.split(r",(?![^(\[]*[)\]])", text)]


def _value(text: str, name: str, config: ConfigDict) -> Any:
    old = config_lib.flatten(config.to_dict())[name]
    kind = tuple if isinstance(old, list) else type(old)
    try:
        return _PARSERS[kind].parse(text.strip())
    except (KeyError, TypeError, ValueError, SyntaxError):
        raise InputError(f"config.{name} is {text!r}: expected a value as {old!r} is one") from None


def stored_points(stored: Callable[..., None], config: ConfigDict) -> list[Overrides]:
    """Returns the points of a config file's ``sweep(add)``: ``add(field=value, …)`` adds one.

    Raises:
      InputError: there is no such field, or no point was added.
    """
    points: list[Overrides] = []

    def add(**fields: Any) -> None:
        point = {name.removeprefix("config."): value for name, value in fields.items()}
        for name in point:
            check_field(name, config)
        points.append(point)

    stored(add)
    if not points:
        raise InputError("sweep(add) of the config file has added no point: call add(field=value)")
    return points


# The runs.


def runs(sweep: Sweep, datasets: "Datasets") -> list[Run]:
    """Returns the runs of every point by seed; of a closed form, which has no seed, one.

    Raises:
      InputError: the points are ranked on different held-out items.
    """
    found, common = [], None
    for number, overrides in enumerate(sweep.points):
        first = sweep.config.seed
        for seed in range(first, first + sweep.seeds):
            config = ConfigDict(sweep.config.to_dict())
            try:
                config.update_from_flattened_dict({**overrides, "seed": seed})
                config_lib.validate(config)
                if config.on_nonfinite != "stop":
                    raise InputError(
                        f"config.on_nonfinite is {config.on_nonfinite!r}: expected stop in a "
                        "sweep, where a run that diverges is a row and the others go on"
                    )
                dataset = datasets.of(config)
            except (InputError, TypeError) as error:
                found.append(Run(number, seed, config, "", str(error)))
                break
            held_out = dataset.valid
            common = common or held_out
            if held_out is not common and not all(map(np.array_equal, common, held_out)):
                raise InputError(
                    f"point {number} ({_fields(overrides)}) has other validation items than "
                    "the points before, and their metrics do not compare: sweep each data set apart"
                )
            found.append(Run(number, seed, config, figures.key(config, dataset.meta["hash"])))
            if models.build(config).closed_form:
                break
    return found


class Datasets:
    """Data sets by ``config.data``, each loaded once, all without their test split.

    Args:
      given: the data of every config, whatever it says; by default what it says.
    """

    def __init__(self, given: Dataset | None = None) -> None:
        self._given = given
        self._loaded: dict[str, Dataset] = {}

    def of(self, config: ConfigDict) -> Dataset:
        """Returns the data of a config."""
        if self._given is not None:
            return search.without_test(self._given)
        key = json.dumps(config.data.to_dict(), sort_keys=True)
        if key not in self._loaded:
            self._loaded[key] = search.without_test(load_dataset(config))
        return self._loaded[key]


def units(sweep: Sweep, planned: Sequence[Run]) -> list[Unit]:
    """Returns what is left to train: populations begun before, then new ones and single runs."""
    by_key = {run.key: run.config for run in planned if run.key}
    missing = [key for key in by_key if not _result(sweep, key).exists()]
    found = []
    for path in sorted((sweep.workdir / "populations").glob("*/members.json")):
        try:
            keys = files.read_json(path)
            if not (type(keys) is list and all(type(key) is str for key in keys)):
                raise ValueError("no list of keys")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read as a population's runs ({error}); take {path.parent} away, "
                "and they are trained again"
            ) from None
        if not set(keys) & set(missing):
            shutil.rmtree(path.parent)  # killed after the last result
        elif set(keys) <= by_key.keys():
            found.append(Unit([by_key[key] for key in keys], keys, path.parent))
            missing = [key for key in missing if key not in keys]
    groups: dict[str, list[str]] = {}
    for key in missing:
        config = by_key[key]
        trained = isinstance(models.build(config), Model)
        groups.setdefault(population.program(config) if trained else key, []).append(key)
    for keys in groups.values():
        for share in np.array_split(keys, -(-len(keys) // sweep.members)):
            members = [str(key) for key in share]
            digest = hashlib.sha256(" ".join(members).encode()).hexdigest()[:16]
            folder = sweep.workdir / "populations" / digest
            found.append(Unit([by_key[key] for key in members], members, folder))
    return found


def _result(sweep: Sweep, key: str) -> Path:
    return sweep.workdir / "results" / f"{key}.json"


def work(unit: Unit, results: Path, datasets: Datasets, name: str) -> None:
    """Trains a unit and writes a result a run, ``failed`` with the reason in one that failed."""

    def say(line: str) -> None:
        print(f"{name}: {line}", flush=True)

    config = unit.configs[0]
    dataset = datasets.of(config)
    try:
        if isinstance(models.build(config), FittedModel):
            records = [search.evaluate(config, dataset)]
        else:
            unit.folder.mkdir(parents=True, exist_ok=True)
            write_json(unit.folder / "members.json", unit.keys)
            records = population.train(unit.configs, dataset, unit.folder, say)
    except InputError as error:
        records = [{"failed": str(error)} for _ in unit.configs]
    for key, config, record in zip(unit.keys, unit.configs, records, strict=True):
        stored = {"config": json.loads(config.to_json()), "dataset_hash": dataset.meta["hash"]}
        write_json(results / f"{key}.json", {**record, **stored})
    shutil.rmtree(unit.folder, ignore_errors=True)


def _work_apart(unit: Unit, results: Path, name: str) -> None:
    """``work`` in a process of its own, which ends with its parent."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    work(unit, results, Datasets(), name)


def _train(sweep: Sweep, todo: list[Unit], datasets: Datasets) -> dict[str, str]:
    """Trains what is left; returns why a run has no result, by key."""
    results = sweep.workdir / "results"
    named = [(f"{number}/{len(todo)}", unit) for number, unit in enumerate(todo, 1)]
    errors: list[tuple[Unit, BaseException]] = []
    if sweep.jobs == 1 or len(todo) < 2:
        for name, unit in named:
            try:
                work(unit, results, datasets, name)
            except (jax.errors.JaxRuntimeError, MemoryError) as error:  # of memory, mostly
                errors.append((unit, error))
    else:
        # Not forked: JAX has threads by now.
        context = multiprocessing.get_context("spawn")
        with futures.ProcessPoolExecutor(sweep.jobs, context) as pool:
            pending = [
                (unit, pool.submit(_work_apart, unit, results, name)) for name, unit in named
            ]
        found = [(unit, future.exception()) for unit, future in pending]
        errors = [(unit, error) for unit, error in found if error is not None]
    return {
        key: f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for unit, error in errors
        for key in unit.keys
    }


# The report.


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
    planned = runs(sweep, datasets)
    if all(run.problem for run in planned):
        raise InputError(planned[0].problem)
    for problem in dict.fromkeys(run.problem for run in planned if run.problem):
        print(f"cannot be run, and is left out: {problem}", file=sys.stderr, flush=True)
    make_report_folder(sweep.workdir)
    make_folder(sweep.workdir / "results")
    with lock.owned(sweep.workdir):
        return _run(sweep, planned, datasets, jobs=1 if dataset is not None else sweep.jobs)


def _run(sweep: Sweep, planned: list[Run], datasets: Datasets, *, jobs: int) -> list[Record]:
    todo = units(sweep, planned)
    left = sum(len(unit.keys) for unit in todo)
    print(
        f"{len(sweep.points)} points, {len(planned)} runs, {left} of them to do, in "
        f"{len(todo)} {'program' if len(todo) == 1 else 'programs'}; writing to {sweep.workdir}",
        flush=True,
    )
    unfinished = _train(sweep._replace(jobs=jobs), todo, datasets)
    rows = [_row(sweep, run, unfinished) for run in planned]
    write_text(sweep.workdir / "sweep.csv", _csv(rows))
    points = summary(sweep, rows)
    text = markdown(sweep, rows, points)
    write_text(sweep.workdir / "sweep.md", text)
    print(text)
    for row in rows:
        if row["failed"]:
            print(f"failed: point {row['point']} seed {row['seed']}: {row['failed']}", flush=True)
    try:
        draw(sweep, points)
    except InputError as error:
        print(f"no sweep.png: {error}", file=sys.stderr)
    if unfinished:
        raise InputError(
            f"{len(unfinished)} runs ended without a result ({next(iter(unfinished.values()))}): "
            "the same command tries them again, with fewer --members in less memory"
        )
    if not points:
        raise InputError(f"no point without a failed run; see {sweep.workdir / 'sweep.csv'}")
    return rows


def _row(sweep: Sweep, run: Run, unfinished: dict[str, str]) -> Record:
    """A row of sweep.csv; every row has the same columns."""
    fields = dict.fromkeys(name for point in sweep.points for name in point)
    swept = config_lib.flatten(run.config.to_dict())
    record: Record = {"failed": run.problem or unfinished.get(run.key, "")}
    if run.key and run.key not in unfinished:
        record = _read_record(_result(sweep, run.key))
    row = {"point": run.point, "seed": run.seed}
    row |= {f"config.{name}": swept[name] for name in fields}
    row |= {name: record.get("valid", {}).get(name) for name in _metric_names(sweep.config)}
    row |= {name: record.get(name) for name in ("best_epoch", "epochs", "seconds")}
    losses = record.get("first_losses", {}).get("target", [])
    for step in range(FIRST_STEPS):
        row[f"target_loss_step_{step + 1}"] = losses[step] if step < len(losses) else None
    return row | {"failed": record.get("failed", "")}


def _read_record(path: Path) -> Record:
    try:
        record = files.read_json(path)
        if type(record.get("failed", "")) is not str:
            raise TypeError("failed is no text")
        if "failed" not in record:
            values = [*record["valid"].values(), *record.get("first_losses", {}).get("target", [])]
            values += [record[name] for name in ("best_epoch", "epochs", "seconds")]
            if not all(type(value) in (int, float) for value in values):
                raise TypeError("a number is something else")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as the result of a run ({error!r}); take it away, and the run "
            "is done again"
        ) from None
    return record


def _metric_names(config: ConfigDict) -> list[str]:
    return [f"{name}@{config.eval_k}" for name in (*tables.METRICS, "mrr_published")] + ["auc"]


def _csv(rows: list[Record]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class Point(NamedTuple):
    """A point whose runs are all done.

    Attributes:
      number: of the point.
      overrides: its fields.
      metrics: {metric: f64[seeds]} on validation.
    """

    number: int
    overrides: Overrides
    metrics: dict[str, np.ndarray]


def summary(sweep: Sweep, rows: list[Record]) -> list[Point]:
    """Returns the points none of whose runs failed, the best mean validation NDCG first."""
    found = []
    for number, overrides in enumerate(sweep.points):
        own = [row for row in rows if row["point"] == number]
        if own and not any(row["failed"] for row in own):
            names = _metric_names(sweep.config)
            values = {name: np.array([row[name] for row in own]) for name in names}
            found.append(Point(number, overrides, values))
    ndcg = f"ndcg@{sweep.config.eval_k}"
    return sorted(found, key=lambda point: -point.metrics[ndcg].mean())


def train_command(sweep: Sweep, overrides: Overrides, seed: int) -> str:
    """Returns the launch/train.py command of a run of a point."""
    folder = f"--workdir={sweep.workdir / 'best' / f'seed_{seed}'}"
    fields = {**sweep.given, **overrides, "seed": seed}
    return table2.command("train", sweep.file, fields, folder)


def markdown(sweep: Sweep, rows: list[Record], points: list[Point]) -> str:
    """Returns sweep.md: the best point with its commands, and every point."""
    names = _metric_names(sweep.config)[:3]
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
        lines += [f"Best by validation {names[1]}: {_fields(best.overrides)}", ""]
        seeds = [row["seed"] for row in rows if row["point"] == best.number]
        lines += [f"    {train_command(sweep, best.overrides, seed)}" for seed in seeds]
        lines.append("")
    cells = [
        [str(point.number), _fields(point.overrides)]
        + [tables.mean_cell(tables.spread_of(point.metrics[name])) for name in names]
        for point in points
    ]
    return "\n".join([*lines, *tables.table(["point", "fields", *names], cells)]) + "\n"


def _fields(overrides: Overrides) -> str:
    return ", ".join(f"{name}={value}" for name, value in overrides.items()) or "defaults"


def draw(sweep: Sweep, points: list[Point]) -> None:
    """Draws sweep.png: validation NDCG by each swept field, a line where the others are equal.

    Raises:
      InputError: matplotlib is missing.
    """
    matplotlib = figures.load_matplotlib()
    fields = list(dict.fromkeys(name for point in points for name in point.overrides))
    if not fields:
        return
    # A point is at the config's own value of a field that it does not change.
    own = config_lib.flatten(sweep.config.to_dict())
    own = {name: own[name] for name in fields}
    points = [point._replace(overrides=own | point.overrides) for point in points]
    metric = f"ndcg@{sweep.config.eval_k}"
    with matplotlib.rc_context({"font.size": 8}):
        size = (3.4 * len(fields), 3.0)
        page = matplotlib.figure.Figure(figsize=size, layout="constrained")
        axes = page.subplots(1, len(fields), sharey=True, squeeze=False)[0]
        for ax, field in zip(axes, fields, strict=True):
            _panel(ax, field, fields, points, metric)
        axes[0].set_ylabel(f"validation {metric}")
        write_with(sweep.workdir / "sweep.png", partial(page.savefig, format="png", dpi=200))


def _panel(ax: Any, field: str, fields: list[str], points: list[Point], metric: str) -> None:
    """One pair of axes of ``draw``."""
    values = sorted({_x(point.overrides[field]) for point in points}, key=_order)
    numeric = all(isinstance(value, float) for value in values)
    place = {value: value if numeric else at for at, value in enumerate(values)}
    lines: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.number):
        others = {name: point.overrides[name] for name in fields if name != field}
        lines.setdefault(_fields(others), []).append(point)
    joined = any(len(line) > 1 for line in lines.values())
    for at, (label, line) in enumerate(lines.items()):
        line = sorted(line, key=lambda point: place[_x(point.overrides[field])])
        spreads = [tables.spread_of(point.metrics[metric]) for point in line]
        ax.errorbar(
            [place[_x(point.overrides[field])] for point in line],
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
    if joined and 1 < len(lines) <= 8:
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
        ax.legend(frameon=False, fontsize=7, ncols=2, **above)
    ax.set_xlabel(f"config.{field}")
    ax.grid(color="0.9", linewidth=0.5)
    ax.set_axisbelow(True)


def _x(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else str(value)


def _order(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value
