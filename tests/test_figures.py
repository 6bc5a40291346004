"""Figures: their numbers against runs made elsewhere, their files, and what is computed anew."""

import csv
import sys

import numpy as np
import pytest
from test_launch import ROOT, assert_one_line_error, launch

from conet_jax import metrics
from conet_jax.config import default_config
from conet_jax.data import synthetic
from conet_jax.errors import InputError
from conet_jax.run.fit import fit
from conet_jax.studies import drawing, figures, population, search

DEMO = f"--config={ROOT / 'configs' / 'demo.py'}"
SIZES = dict(
    num_users=60,
    num_target_items=130,
    num_source_items=120,
    target_interactions=420,
    source_interactions=500,
)


def data_of(seed):
    return synthetic.dataset(**SIZES, seed=seed)[0]


@pytest.fixture(scope="module")
def data():
    return data_of(0)


def tiny(variant="lasso", **fields):
    config = default_config(variant)
    config.ials_trials = 0
    config.name = "tiny"
    config.layers = (8, 4)  # the fewest programs to compile
    config.cross_layers = 1
    config.epochs = 3
    config.batch_size = 64
    config.update(fields)
    return config


def both(**fields):
    return {name: tiny(name, **fields) for name in ("conet", "lasso")}


@pytest.fixture
def grids(monkeypatch):
    for name, values in (("2a", (0.5, 1.0)), ("3a", (0.0, 1e-3)), ("3c", (1, 2)), ("3d", (1, 2))):
        monkeypatch.setitem(figures.FIGURES, name, figures.FIGURES[name]._replace(values=values))


@pytest.fixture
def calls(monkeypatch):
    """Runs that were trained, in order; the training itself is stood in for."""
    made = []

    def train(configs, dataset, folder, say):
        made.extend(configs)
        return [made_up(config, len(made)) for config in configs]

    monkeypatch.setattr(population, "train", train)
    return made


def made_up(config, seed, **fields):
    """A record of a run that nobody has trained."""
    rng = np.random.default_rng(seed)
    epochs = [
        {
            "epoch": epoch,
            "train_loss": rng.uniform(),
            "valid": {name: rng.uniform() for name in VALID},
            "valid_warm": {name: rng.uniform() for name in VALID},
            "seconds": rng.uniform(),
            "h_zeros": rng.uniform(),
            "h_mean_abs": rng.uniform(),
        }
        | fields
        for epoch in range(1, config.epochs + 1)
    ]
    best = max(epochs, key=lambda epoch: epoch["valid_warm"]["ndcg@10"])
    numbers = {"best_epoch": best["epoch"], "epochs": len(epochs), "seconds": 1.0}
    return {part: best[part] for part in search.PARTS} | {"history": epochs, **numbers}


VALID = [metric.key(10) for metric in metrics.METRICS]


def history(config, dataset, folder):
    """What is kept of the epochs of a run."""
    (record,) = population.train([config], dataset, folder)
    return record["history"]


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_numbers_are_those_of_the_run_that_fit_makes(data, grids, tmp_path):
    figures.write(["2a"], both(), tmp_path / "figures", seeds=2, dataset=data)
    rows = table(tmp_path / "figures" / "2a.csv")
    assert {(r["method"], float(r["target_weight"]), int(r["seed"])) for r in rows} == {
        (method, x, seed) for method in ("conet", "lasso") for x in (0.5, 1.0) for seed in (0, 1)
    }
    result = fit(tiny(target_weight=0.5, seed=1), tmp_path / "run", dataset=data)
    place = {"method": "lasso", "target_weight": "0.5", "seed": "1"}
    (row,) = (row for row in rows if place.items() <= row.items())
    # Another program, which rounds in another way.
    assert int(row["epoch"]) == result["best_epoch"]
    for metric in ("hit_ratio@10", "ndcg@10", "mrr@10"):
        assert float(row[metric]) == pytest.approx(result["valid"][metric], abs=0.005)


def test_test_items_are_not_looked_at(data, tmp_path):
    def numbers(name, dataset):
        epochs = history(tiny(), dataset, tmp_path / name)
        return [{name: x for name, x in epoch.items() if name != "seconds"} for epoch in epochs]

    assert numbers("none", data._replace(test=None)) == numbers("all", data)


@pytest.mark.slow
def test_proximal_step_leaves_exact_zeros_and_the_subgradient_none(data, tmp_path):
    proximal = history(tiny(l1=1.0, l1_method="proximal"), data, tmp_path / "proximal")[-1]
    assert proximal["h_zeros"] == 1.0 and proximal["h_mean_abs"] == 0.0
    subgradient = history(tiny(l1=1.0), data, tmp_path / "subgradient")[-1]
    assert subgradient["h_zeros"] == 0.0 and 0 < subgradient["h_mean_abs"] < 0.01


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_drawn_with_its_numbers(name, data, calls, tmp_path):
    figures.write([name], both(), tmp_path, seeds=2, dataset=data)
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "</svg>" in (tmp_path / f"{name}.svg").read_text()
    rows = table(tmp_path / f"{name}.csv")
    figure = figures.FIGURES[name]
    assert list(rows[0])[:3] == [figure.field, "method", "seed"]
    epochs = 3 if figure.field == "epoch" else 1
    assert len(rows) == epochs * len(figures.points(name, both(), 2))


@pytest.mark.parametrize("name", figures.FIGURES)
def test_one_seed_and_missing_values_are_drawn(name, data, tmp_path, monkeypatch):
    without = {"h_zeros": None, "h_mean_abs": None}

    def train(configs, *rest):
        return [made_up(config, 0, **without) for config in configs]

    monkeypatch.setattr(population, "train", train)
    figures.write([name], {"other": tiny("lasso")}, tmp_path, seeds=1, dataset=data)
    assert (tmp_path / f"{name}.png").stat().st_size > 0


def test_second_call_computes_nothing_and_writes_the_same(data, calls, tmp_path):
    figures.write(["2b", "3b"], both(), tmp_path, seeds=2, dataset=data)
    assert len(calls) == 2 * 2 * 2 + 2 * 2
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    figures.write(["2b", "3b"], both(), tmp_path, seeds=2, dataset=data)
    assert len(calls) == 12
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_figures_share_runs(data, calls, tmp_path):
    figures.write(["3c", "3d"], both(), tmp_path, seeds=1, dataset=data)
    assert len(calls) == 10  # lasso alone, and for both figures once
    figures.write(["2a"], both(), tmp_path, seeds=1, dataset=data)
    assert len(calls) == 10 + 20
    figures.write(["3a"], both(), tmp_path, seeds=1, dataset=data)
    assert len(calls) == 30 + 6  # one of the eight penalties is the variant's own, one is conet's


def test_other_config_or_data_computes_anew_and_another_name_does_not(data, calls, tmp_path):
    def made(methods, dataset):
        before = len(calls)
        figures.write(["3b"], methods, tmp_path, seeds=2, dataset=dataset)
        return len(calls) - before

    assert made(both(), data) == 4
    assert made(both(name="other"), data) == 0
    assert made(both(learning_rate=0.01), data) == 4
    assert made(both(), data_of(1)) == 4
    assert made(both(), data) == 0


def test_figures_are_trained_as_populations_and_timed_runs_alone(data, tmp_path, monkeypatch):
    sizes = []

    def train(configs, *rest):
        sizes.append(len(configs))
        return [made_up(config, 0) for config in configs]

    monkeypatch.setattr(population, "train", train)
    figures.write(["2a", "3a", "3b"], both(), tmp_path, seeds=2, dataset=data)
    # One program: of two methods ten weights and a curve; eight penalties, of which one is the
    # variant's own and one, none, is conet's.
    assert sizes == [28, 28] and sum(sizes) == 2 * (2 * (10 + 1) + 8 - 2)
    figures.write(["3c"], both(), tmp_path, seeds=2, dataset=data)
    assert sizes[2:] == [1] * 20


def test_interrupted_command_goes_on_where_it_was(data, calls, tmp_path, monkeypatch):
    train = population.train

    def interrupted(configs, *rest):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(configs, *rest)

    monkeypatch.setattr(population, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        figures.write(["3c"], both(), tmp_path, seeds=1, dataset=data)
    assert len(calls) == len(list((tmp_path / "results").glob("*.json"))) == 3
    monkeypatch.setattr(population, "train", train)
    figures.write(["3c"], both(), tmp_path, seeds=1, dataset=data)
    assert len(calls) == len(list((tmp_path / "results").glob("*.json"))) == 10


def test_run_that_diverges_ends_the_figure_with_its_name(data, tmp_path, monkeypatch):
    def train(configs, *rest):
        return [
            {"failed": "a loss is not finite"} if config.seed else made_up(config, 0)
            for config in configs
        ]

    monkeypatch.setattr(population, "train", train)
    message = r"figure 3b, run 2 of 4: conet seed=1 failed: a loss is not finite"
    with pytest.raises(InputError, match=message):
        figures.write(["3b"], both(), tmp_path, seeds=2, dataset=data)


def test_seconds_are_the_median_without_the_first_epoch(data, tmp_path):
    plan = figures.plan("3c", both(), data, tmp_path, 1)
    records = {}
    for run in plan.runs:
        record = made_up(tiny(epochs=4), 0)
        for epoch, seconds in zip(record["history"], (60, 3, 1, 2), strict=True):
            epoch |= {"seconds": seconds, "valid_warm": dict.fromkeys(VALID, 0.5)}
        records[run.key] = record
    rows = figures.rows("3c", plan, records)
    assert [row["seconds"] for row in rows] == [2.0] * 10
    assert [row["epoch"] for row in rows] == [1] * 10  # the first of equals is the best


def test_curves_do_not_stop_early():
    for name in ("3b", "sparsity"):
        for point in figures.points(name, both(patience=1), 1):
            assert point.config.patience == point.config.epochs == 3


def test_band_is_mean_and_standard_deviation_over_seeds():
    rows = [
        {"x": x, "method": "lasso", "seed": seed, "y": y}
        for x, ys in ((2, (1.0, 3.0)), (1, (4.0, 4.0)))
        for seed, y in enumerate(ys)
    ]
    rows.append({"x": 1, "method": "conet", "seed": 0, "y": 99.0})
    xs, mean, std = drawing._band(rows, "lasso", "x", "y")
    assert xs.tolist() == [1, 2] and mean.tolist() == [4.0, 2.0]
    np.testing.assert_allclose(std, [0.0, 2**0.5])


def test_missing_matplotlib_is_named_before_anything_is_run(data, calls, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r'pip install "conet-jax\[plots\]"'):
        figures.write(["3b"], both(), tmp_path, dataset=data)
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--figure=2c"], ["2c", *figures.FIGURES, "all"]),
        (["--seeds=0"], ["seeds"]),
        (["--methods=conett"], ["unknown variant 'conett'"]),
        (["--methods=mlp"], ["config.model=mlp", "--methods"]),
        (["--methods=conet", "--figure=3a"], ["conet", "--config.l1"]),
        (["--methods=lasso", f"{DEMO}:conet"], ["'conet'", "--methods"]),
        (["--config.targt_weight=0.5"], ["target_weight"]),
    ],
)
def test_bad_input_is_one_line_and_status_two(arguments, fragments, tmp_path):
    given = [] if any(DEMO in text for text in arguments) else [DEMO]
    done = launch("figures", *given, f"--workdir={tmp_path / 'out'}", *arguments)
    assert_one_line_error(done, *fragments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ([DEMO], ["conet", "lasso"]),
        ([DEMO, "--methods=low_rank,l2"], ["low_rank", "l2"]),
        ([f"{DEMO}:low_rank"], ["low_rank"]),
    ],
)
@pytest.mark.slow
def test_variants_and_fields_of_the_command_line_reach_the_runs(arguments, lines, tmp_path):
    small = [f"--config.data.synthetic.{name}={value}" for name, value in SIZES.items()]
    small += ["--config.epochs=1", "--config.layers=(8,4)", "--config.cross_layers=1"]
    arguments = [*arguments, f"--workdir={tmp_path}", "--figure=3b", "--seeds=1", *small]
    done = launch("figures", *arguments)
    assert done.returncode == 0, done.stderr
    assert [row["method"] for row in table(tmp_path / "3b.csv")] == lines
    assert (tmp_path / "3b.png").stat().st_size > 0
    again = launch("figures", *arguments)
    assert again.returncode == 0 and "run 1 of" in done.stdout and "run 1 of" not in again.stdout
