"""Habits of reporting: each against its formula, on ranks made up and on trained models."""

import json

import numpy as np
import pytest
from helpers import ROOT, SMALL, assert_one_line_error, launch
from test_figures import tiny

from conet_jax.data import synthetic
from conet_jax.run.fit import fit
from conet_jax.studies import habits
from conet_jax.studies.habits import Habits
from conet_jax.train import ranking
from conet_jax.train.ranking import Ranks

NAMES = ("hit_ratio", "ndcg", "mrr")


@pytest.fixture(scope="module")
def data():
    return synthetic.dataset(**SMALL)[0]


def made_up(seed):
    rng = np.random.default_rng(seed)
    above = rng.integers(0, 40, 50)
    return Ranks(above, rng.integers(0, 20, 50), np.full(50, 99))


def test_constant_scorer_is_perfect_where_the_test_item_is_listed_first():
    ranks = ranking.rank_scores(np.zeros((50, 100)), np.ones((50, 99), bool))
    ours = habits.figures([ranks], 1, Habits(), k=10)
    assert ours["hit_ratio"] == pytest.approx(0.1, abs=1e-12)
    first = habits.figures([ranks], 1, Habits(ties=True), k=10)
    assert first == {"hit_ratio": 1.0, "ndcg": 1.0, "mrr": 1.0}


def test_miss_is_credited_with_one_eleventh_in_mrr_alone():
    for seed in range(5):
        ours = habits.figures([made_up(seed)], 1, Habits(), k=10)
        credited = habits.figures([made_up(seed)], 1, Habits(misses=True), k=10)
        assert credited["mrr"] == pytest.approx(ours["mrr"] + (1 - ours["hit_ratio"]) / 11)
        assert {**credited, "mrr": 0} == {**ours, "mrr": 0}


def test_ties_first_is_the_metric_of_the_best_place():
    ranks = made_up(0)
    place = ranks.above + 1
    found = habits.figures([ranks], 1, Habits(ties=True), k=10)
    assert found["hit_ratio"] == pytest.approx((place <= 10).mean())
    assert found["ndcg"] == pytest.approx(np.where(place <= 10, 1 / np.log2(place + 1), 0).mean())
    assert found["mrr"] == pytest.approx(np.where(place <= 10, 1 / place, 0).mean())


def test_best_epoch_on_test_is_the_best_of_each_metric_apart():
    test = [made_up(seed) for seed in range(8)]
    chosen = [habits.figures(test, epoch, Habits(), k=10) for epoch in range(1, 9)]
    best = habits.figures(test, 3, Habits(epochs=True), k=10)
    assert best == {name: max(epoch[name] for epoch in chosen) for name in NAMES}
    assert all(best[name] >= chosen[2][name] for name in NAMES)


@pytest.mark.slow
def test_first_row_is_the_result_of_the_run_that_fit_makes(data, tmp_path):
    config = tiny("published_mlp", epochs=4, patience=4, initializer="he", cross_layers=0)
    found = habits.measure(config, data)
    result = fit(config, tmp_path / "run", dataset=data)
    assert (found["epochs"], found["best_epoch"]) == (result["epochs"], result["best_epoch"])
    ours, *others = found["rows"].values()
    assert ours == {name: result["test"][f"{name}@10"] for name in NAMES}
    # No habit lowers a figure.
    assert all(other[name] >= ours[name] for other in others for name in NAMES)


@pytest.mark.slow
def test_report_is_reproducible_and_names_dead_towers(data, tmp_path):
    config = tiny("conet", initializer="gaussian", reduction="mean", epochs=2)
    for name in ("one", "two"):
        result = habits.report(config, tmp_path / name, seeds=2, dataset=data)
    for file in ("habits.json", "habits.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert json.loads((tmp_path / "one" / "habits.json").read_text()) == result
    assert [run["seed"] for run in result["runs"]] == [0, 1]
    assert [run["dead"] for run in result["runs"]] == [{"target": 2, "source": 2}] * 2
    for row, cells in result["mean"].items():
        for metric, mean in cells.items():
            values = [run["rows"][row][metric] for run in result["runs"]]
            assert mean == pytest.approx(np.mean(values))
            assert result["std"][row][metric] == pytest.approx(np.std(values, ddof=1))
    text = (tmp_path / "one" / "habits.md").read_text()
    assert "HR@10 | NDCG@10 | MRR@10" in text and "a miss counts 1/11" in text
    assert "seed 1: 2 epochs" in text and "the source tower was dead after 2 of them" in text


@pytest.mark.slow
def test_interrupted_report_goes_on_with_the_seed_that_it_was_at(data, tmp_path, monkeypatch):
    config = tiny("conet", epochs=1)
    whole = habits.report(config, tmp_path / "whole", seeds=2, dataset=data)
    measure, seeds = habits.measure, []

    def interrupted(config, dataset):
        seeds.append(config.seed)
        if seeds == [0, 1]:
            raise KeyboardInterrupt
        return measure(config, dataset)

    monkeypatch.setattr(habits, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        habits.report(config, tmp_path / "run", seeds=2, dataset=data)
    assert habits.report(config, tmp_path / "run", seeds=2, dataset=data) == whole
    assert seeds == [0, 1, 1]


def test_bad_input_is_one_line_and_status_two(tmp_path):
    assert_one_line_error(launch("habits", f"--workdir={tmp_path}"), "--config is missing")
    demo = f"--config={ROOT / 'configs' / 'demo.py'}"
    assert_one_line_error(launch("habits", demo), "workdir")


@pytest.mark.slow
def test_launcher_prints_what_it_writes(tmp_path):
    demo = f"--config={ROOT / 'configs' / 'demo.py'}:published_mlp"
    done = launch("habits", demo, f"--workdir={tmp_path}", "--config.epochs=2", "--seeds=1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "habits.md").read_text() in done.stdout
    assert json.loads((tmp_path / "habits.json").read_text())["std"] is None
