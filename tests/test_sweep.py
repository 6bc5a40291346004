"""Sweeps: populations against runs of their own, what a kill leaves, and what is written."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_launch import ROOT, assert_one_line_error, launch

from conet_jax.config import default_config
from conet_jax.data import synthetic
from conet_jax.errors import InputError
from conet_jax.run import loop, tune
from conet_jax.run.checkpoints import Checkpoints
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.studies import points, population, runner, search, sweep

DEMO = f"--config={ROOT / 'configs' / 'demo.py'}"
SIZES = dict(
    num_users=60,
    num_target_items=130,
    num_source_items=120,
    target_interactions=420,
    source_interactions=500,
    seed=0,
)
GRID = ["config.learning_rate=0.001,0.03,1e30", "config.l1=0,1e-3"]  # the last rate diverges


@pytest.fixture(scope="module")
def data():
    return synthetic.dataset(**SIZES)[0]


def tiny(variant="lasso", **fields):
    config = default_config(variant)
    config.ials_trials = 0
    config.name = "tiny"
    config.layers = (8, 4)
    config.cross_layers = min(config.cross_layers, 1)
    config.epochs = 5
    config.patience = 1
    config.batch_size = 64
    config.update(fields)
    return config


def a_sweep(workdir, config=None, grid=GRID, **options):
    config = tiny() if config is None else config
    swept = points.parse_grid(grid, config)
    return sweep.Sweep("configs/tiny.py:lasso", config, {}, workdir, swept, **options)


def left_to_do(found, data):
    runs = [entry.run for entry in sweep.entries(found, runner.Datasets(data)) if entry.run]
    return runner.units(runs, found.workdir, runner.VALIDATION, members=found.members)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(rows):
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    trained = []
    train = population.train
    patch.setattr(
        population, "train", lambda configs, *rest: trained.append(configs) or train(configs, *rest)
    )
    patch.setattr(population, "_WORTH", 0)  # those that are over leave the program
    found = a_sweep(tmp_path_factory.mktemp("sweep"), seeds=2)
    rows = sweep.run(found, data._replace(test=None))
    patch.undo()
    assert [len(configs) for configs in trained] == [12]  # one population
    assert [(row["point"], row["seed"]) for row in rows] == [
        (point, seed) for point in range(6) for seed in (0, 1)
    ]
    return found, rows


def succeeded(rows):
    return [row for row in rows if not row["failed"]]


def test_each_row_is_the_run_of_its_overrides_alone(finished, data):
    _, rows = finished
    rows = succeeded(rows)
    assert len(rows) == 8 and len({row["epochs"] for row in rows}) > 1  # patience ends them apart
    for row in rows[::2] + rows[-1:]:
        config = tiny(
            learning_rate=row["config.learning_rate"], l1=row["config.l1"], seed=row["seed"]
        )
        experiment = make_experiment(config, search.without_test(data))
        ends = list(loop.train(experiment, initial_state(experiment)))
        for step, loss in enumerate(ends[0].row["first_losses"]["target"], 1):
            assert row[f"target_loss_step_{step}"] == pytest.approx(loss, abs=1e-5)
        assert row["epochs"] == len(ends) and row["best_epoch"] == ends[-1].progress.best_epoch
        alone = ends[row["best_epoch"] - 1].row["valid"]
        for name in ("hit_ratio@10", "ndcg@10", "mrr@10"):
            assert row[name] == pytest.approx(alone[name], abs=0.005)


def test_runs_that_diverge_are_rows_with_the_reason(finished):
    found, rows = finished
    failed = [row for row in rows if row["failed"]]
    assert [row["config.learning_rate"] for row in failed] == [1e30] * 4
    for row in failed:
        assert "not finite at step" in row["failed"] and row["ndcg@10"] is None
    assert "4 of them failed" in (found.workdir / "sweep.md").read_text()


def test_files_hold_the_rows_and_the_best_command(finished):
    found, rows = finished
    stored = table(found.workdir / "sweep.csv")
    assert [
        {name: str("" if x is None else x) for name, x in row.items()} for row in rows
    ] == stored
    assert list(stored[0])[:5] == [
        "point",
        "seed",
        "config.learning_rate",
        "config.l1",
        "hit_ratio@10",
    ]
    means = [np.mean([r["ndcg@10"] for r in rows if r["point"] == p]) for p in range(4)]
    best = found.points[int(np.argmax(means))]
    text = (found.workdir / "sweep.md").read_text()
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("    python ")]
    assert len(commands) == 2
    for seed, words in enumerate(commands):
        assert words[:3] == ["python", "launch/train.py", "--config=configs/tiny.py:lasso"]
        fields = {**best, "seed": seed}
        assert words[3:6] == [f"--config.{name}={value}" for name, value in fields.items()]
    assert f"{max(means):.4f} ± " in text
    assert (found.workdir / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert not list((found.workdir / "populations").iterdir())


def test_second_call_trains_nothing_and_a_wider_grid_only_what_is_new(finished, data, monkeypatch):
    found, rows = finished
    monkeypatch.setattr(population, "train", None)
    assert sweep.run(found, data) == rows
    trained = []

    def train(configs, *rest):
        trained.extend((config.learning_rate, config.l1, config.seed) for config in configs)
        return [{"failed": "not tried"} for _ in configs]

    monkeypatch.setattr(population, "train", train)
    wider = a_sweep(found.workdir, grid=[GRID[0], "config.l1=0,1e-3,1.0"], seeds=2)
    again = sweep.run(wider, data)
    assert set(trained) == {(rate, 1.0, seed) for rate in (0.001, 0.03, 1e30) for seed in (0, 1)}
    old = [row | {"point": None} for row in again if row["failed"] != "not tried"]
    assert old == [row | {"point": None} for row in rows]


def test_failure_after_any_save_resumes_to_the_same_rows(finished, data, tmp_path, monkeypatch):
    found, rows = finished
    monkeypatch.setattr(population, "_WORTH", 0)

    class Crash(Exception):
        pass

    save = Checkpoints.save_latest

    def crash(self, epoch, *args):
        save(self, epoch, *args)
        if epoch in (1, 4):
            raise Crash

    monkeypatch.setattr(Checkpoints, "save_latest", crash)
    for _ in range(2):
        with pytest.raises(Crash):
            sweep.run(found._replace(workdir=tmp_path), data)
        assert not list((tmp_path / "results").iterdir())
    sizes = [int(path.name) for path in (tmp_path / "populations").glob("*/[0-9]*")]
    assert min(sizes) <= 6  # those that are over have left
    again = sweep.run(found._replace(workdir=tmp_path), data)
    assert without_seconds(again) == without_seconds(rows)


@pytest.mark.parametrize("variant", ["recipe", pytest.param("lasso", marks=pytest.mark.slow)])
def test_population_that_settles_its_rows_is_its_runs_alone(variant, data, tmp_path, monkeypatch):
    monkeypatch.setattr(population, "SETTLE_STEP", 5)
    monkeypatch.setattr(
        "conet_jax.run.epoch.SETTLE_STEP", 5
    )  # of hundreds, in an epoch far from here
    options = dict(epochs=2, folds=2, ials_sweeps=2, fold_sweeps=1, batch_size=32)
    configs = [tiny(variant, l1=l1, **options) for l1 in (0.0, 1e-3)]
    run, axes = population.train_population, set()

    def watched(states, *args, **static):
        axes.update(table.ndim for table in states.tables.values())
        return run(states, *args, **static)

    monkeypatch.setattr(population, "train_population", watched)
    records = population.train(configs, data, tmp_path)
    assert axes == {2 if variant == "recipe" else 3}  # fixed tables are there once
    for config, record in zip(configs, records, strict=True):
        experiment = make_experiment(config, data)
        assert experiment.plan.steps > 5
        ends = list(loop.train(experiment, initial_state(experiment)))
        assert record["epochs"] == len(ends)
        best = ends[record["best_epoch"] - 1].row
        assert record["valid"] == pytest.approx(best["valid"], abs=1e-6)
        assert record["train_loss"] == pytest.approx(best["train_loss"], rel=1e-5)


def test_structure_divides_populations_and_real_values_do_not(data, tmp_path):
    def sizes(*grid, **options):
        found = a_sweep(tmp_path, grid=grid, **options)
        return sorted(len(unit.runs) for unit in left_to_do(found, data))

    real = [
        f"config.{name}=0.1,0.2"
        for name in ("learning_rate", "target_weight", "l1", "l2", "dropout")
    ]
    assert sizes(*real, members=64) == [32]
    assert sizes(*real, members=20) == [16, 16]
    assert sizes("config.dropout=0,0.1,0.2", seeds=3) == [3, 6]
    fixed = tiny("recipe")  # with a start of each seed
    assert sizes("config.learning_rate=0.1,0.2,0.3", config=fixed, seeds=2) == [3, 3]
    assert sizes("config.l1=0,1e-3", "config.l1_method=proximal,subgradient") == [2, 2]
    assert sizes("config.negatives=1,2", "config.l1=0,1") == [2, 2]
    assert sizes("config.learning_rate=0.1,0.2", config=tiny("popularity")) == [1, 1]


def test_point_that_cannot_be_run_is_a_row_and_the_others_go_on(data, tmp_path, capsys):
    grid = ["config.max_items=100,20000,0"]
    rows = sweep.run(a_sweep(tmp_path, tiny("ease"), grid), data)
    assert [row["failed"][:25] for row in rows] == [
        "EASE inverts a matrix of ",
        "",
        "config.max_items is 0: ex",
    ]
    printed = capsys.readouterr()
    assert "cannot be run, and is left out: config.max_items is 0" in printed.err
    assert "failed: point 0 seed 0: EASE inverts" in printed.out
    # A failure is a result: it is not tried again.
    again = a_sweep(tmp_path, tiny("ease"), grid)
    assert not left_to_do(again, data)
    with pytest.raises(InputError, match="no point without a failed run"):
        sweep.run(a_sweep(tmp_path, tiny("ease"), ["config.max_items=100"]), data)


def test_out_of_memory_is_a_row_that_is_tried_again_and_the_others_go_on(
    data, tmp_path, monkeypatch
):
    evaluate = search.evaluate

    def full(config, dataset):
        if config.seed == 0:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return evaluate(config, dataset)

    found = a_sweep(tmp_path, tiny("ials", epochs=1), ["config.ials_alpha=1"], seeds=2)
    monkeypatch.setattr(search, "evaluate", full)
    with pytest.raises(InputError, match="1 runs ended without a result .*out of memory"):
        sweep.run(found, data)
    rows = table(tmp_path / "sweep.csv")
    assert ["out of memory" in row["failed"] for row in rows] == [True, False]
    monkeypatch.setattr(search, "evaluate", evaluate)
    assert len(succeeded(sweep.run(found, data))) == 2


def test_constants_are_searched_once_for_all_seeds(data, tmp_path, monkeypatch):
    searched, search_for = [], tune._search
    monkeypatch.setattr(tune, "_search", lambda *given: searched.append(1) or search_for(*given))
    config = tiny("ials", ials_trials=3, ials_sweeps=2)
    rows = sweep.run(a_sweep(tmp_path, config, ["config.epochs=1,2"], seeds=2), data)
    assert len(rows) == 4 and succeeded(rows) and len(searched) == 1


def test_models_without_gradients_are_swept_one_by_one(data, tmp_path):
    found = a_sweep(tmp_path, tiny("ials", epochs=2), ["config.ials_alpha=1,40"], seeds=2)
    rows = sweep.run(found, data)
    expected = search.evaluate(tiny("ials", epochs=2, ials_alpha=40.0, seed=1), data)
    assert rows[3]["ndcg@10"] == expected["valid"]["ndcg@10"]
    closed = sweep.run(a_sweep(tmp_path, tiny("popularity"), ["config.epochs=1"], seeds=3), data)
    assert len(closed) == 1  # nothing is random in it


def test_missing_matplotlib_is_a_line_and_the_tables_are_there(
    finished, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = a_sweep(tmp_path, tiny("popularity"), ["config.epochs=1"])
    sweep.run(found, data)
    assert 'pip install "conet-jax[plots]"' in capsys.readouterr().err
    assert (tmp_path / "sweep.csv").exists() and not (tmp_path / "sweep.png").exists()


def test_values_are_of_the_field_s_type():
    config = tiny()
    found = points.parse_grid(
        ["config.layers=(64, 32),(8,4)", "target_weight=1", "config.joined=true,false"], config
    )
    assert found[0] == {"layers": (64, 32), "target_weight": 1.0, "joined": True}
    assert len(found) == 4 and isinstance(found[0]["target_weight"], float)
    for text in ("config.negatives=1.5", "config.l1=small", "config.joined=maybe"):
        with pytest.raises(InputError, match=text.split("=")[0]):
            points.parse_grid([text], config)


def test_space_is_ranges_and_choices_and_the_variant_s_own():
    config = tiny()
    space = points.parse_space(
        ["config.l1=log(1e-6,1e-2)", "config.dropout=uniform(0, 0.5)", "config.negatives=1,4"],
        config,
    )
    assert space == {
        "l1": search.Range(1e-6, 1e-2),
        "dropout": search.Range(0.0, 0.5, log=False),
        "negatives": (1, 4),
    }
    assert points.parse_space(["default"], config) == search.SPACES["lasso"]
    for text in ("config.l1=log(0,1)", "config.l1=uniform(2,1)", "config.negatives=log(1,4)"):
        with pytest.raises(InputError, match="LOW < HIGH"):
            points.parse_space([text], config)


def test_points_of_a_config_file_are_those_it_adds():
    def stored(add):
        for weight in (0.2, 0.8):
            add(target_weight=weight, l1=0.0)
        add(**{"data.drop": 1})

    assert points.stored_points(stored, tiny()) == [
        {"target_weight": 0.2, "l1": 0.0},
        {"target_weight": 0.8, "l1": 0.0},
        {"data.drop": 1},
    ]
    with pytest.raises(InputError, match=r"did you mean config\.target_weight"):
        points.stored_points(lambda add: add(targt_weight=0.2), tiny())
    with pytest.raises(InputError, match="no point"):
        points.stored_points(lambda add: None, tiny())


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("config.targt_weight=1", r"did you mean config\.target_weight"),
        ("config.l1", r"config\.FIELD=VALUE"),
        ("config.seed=1,2", "--seeds"),
        ("config.variant=conet", "launch/table2.py"),
    ],
)
def test_field_that_cannot_be_swept_is_an_error(text, fragment):
    with pytest.raises(InputError, match=fragment):
        points.parse_grid([text], tiny())
    with pytest.raises(InputError, match=fragment):
        points.parse_space([text], tiny())


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ([], ["nothing to sweep", "--grid=config.FIELD", "sweep(add)"]),
        (["--trials=3"], ["--space"]),
        (["--grid=config.l1=0", "--space=default", "--trials=3"], ["--grid and --space"]),
        (["--grid=config.target_weight=2"], ["config.target_weight is 2.0"]),
    ],
)
def test_bad_input_is_one_line_and_status_two(arguments, fragments, tmp_path):
    done = launch("sweep", DEMO, f"--workdir={tmp_path / 'out'}", *arguments)
    assert_one_line_error(done, *fragments)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_sweep_killed_in_the_middle_ends_the_same_and_its_best_command_is_the_row(tmp_path):
    small = [f"--config.data.synthetic.{name}={value}" for name, value in SIZES.items()]
    config = tmp_path / "config.py"
    config.write_text(
        (ROOT / "configs" / "demo.py").read_text()
        + "\n\ndef sweep(add):\n    for l1 in (0.0, 1e-3):\n        add(l1=l1)\n"
    )
    arguments = [f"--config={config}:lasso", "--config.epochs=12", "--config.patience=12", *small]

    def command(workdir, *extra):
        return [
            sys.executable,
            str(ROOT / "launch" / "sweep.py"),
            *arguments,
            f"--workdir={workdir}",
            "--seeds=2",
            *extra,
        ]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    process = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.DEVNULL)
    saved = tmp_path / "killed" / "populations"
    while not list(saved.glob("*/*/latest/4")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "killed" / "results").glob("*.json"))
    done = subprocess.run(command(tmp_path / "killed"), capture_output=True, text=True, check=True)
    assert "epoch   1 " not in done.stdout and "epoch  12 " in done.stdout
    rows = table(tmp_path / "killed" / "sweep.csv")
    assert without_seconds(rows) == without_seconds(table(tmp_path / "whole" / "sweep.csv"))

    # Two processes, a run each: other programs, the same rows.
    subprocess.run(
        command(tmp_path / "jobs", "--jobs=2", "--members=1"), check=True, capture_output=True
    )
    for row, other in zip(rows, table(tmp_path / "jobs" / "sweep.csv"), strict=True):
        assert float(row["ndcg@10"]) == pytest.approx(float(other["ndcg@10"]), abs=0.005)

    text = (tmp_path / "killed" / "sweep.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("    python "))
    subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True, cwd=ROOT)
    workdir = next(word for word in shlex.split(line) if word.startswith("--workdir="))[10:]
    with open(f"{workdir}/result.json") as file:
        result = json.load(file)
    with open(f"{workdir}/metrics.jsonl") as file:
        first = json.loads(file.readline())["first_losses"]["target"]
    (row,) = [
        row
        for row in rows
        if (float(row["config.l1"]), int(row["seed"])) == (result["config"]["l1"], result["seed"])
    ]
    assert float(row["ndcg@10"]) == pytest.approx(result["valid"]["ndcg@10"], abs=0.005)
    for step, loss in enumerate(first, 1):
        assert float(row[f"target_loss_step_{step}"]) == pytest.approx(loss, abs=1e-5)
