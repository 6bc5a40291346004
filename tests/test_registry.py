"""A metric is one entry of ``metrics.METRICS``: added here, it is in every file, table and plot."""

import csv
import json

import numpy as np
import pytest
from test_compare import config_of
from test_sweep import SIZES, tiny

from conet_jax import metrics
from conet_jax.data import synthetic
from conet_jax.metrics import METRICS, Metric, hit_ratio
from conet_jax.run.fit import fit
from conet_jax.run.logs import result_markdown
from conet_jax.studies import compare, crossing, drawing, figures, habits, points, sweep, table2
from conet_jax.train import ranking

# A new metric, and a known one at a cut of its own.
ADDED = (
    Metric("median", "Median", lambda above, tied, candidates, k: above + tied / 2 + 1),
    Metric("hit_ratio@3", "HR@3", lambda a, t, c, k: hit_ratio(a, t, k=3), has_cut=False),
)
KEYS = ["median@10", "hit_ratio@3"]
HEADINGS = ["Median@10", "HR@3"]


@pytest.fixture(autouse=True)
def added(monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", (*METRICS, *ADDED))


@pytest.fixture(scope="module")
def data():
    return synthetic.dataset(**SIZES)[0]


def cells(text, first):
    """The cells of the first row of a Markdown table that begins with a word, by column."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    at = next(at for at, line in enumerate(lines) if line[:1] == [first])
    head = next(at for at in range(at, 0, -1) if set("".join(lines[at])) == {"-", ":"}) - 1
    return dict(zip(lines[head], lines[at], strict=True))


def test_summary_has_it():
    found = metrics.summarize([0, 4], [0, 1], 9, k=10)
    assert found["median@10"] == np.mean([1.0, 5.5]) and found["hit_ratio@3"] == 0.5


def test_files_of_a_run_and_its_comparison_have_it(data, tmp_path):
    result = fit(config_of("popularity"), tmp_path / "run", dataset=data, quiet=True)
    with np.load(tmp_path / "run" / "ranks.npz") as ranks:
        expected = np.mean(ranks["test_above"] + ranks["test_tied"] / 2 + 1)
    assert result["test"]["median@10"] == expected
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert set(KEYS) <= row["valid"].keys()
    text = (tmp_path / "run" / "result.md").read_text()
    assert text == result_markdown(result)
    assert cells(text, "test")["median@10"] == f"{expected:.4f}"
    report = compare.report([tmp_path / "run"], split="test")
    assert cells(report, "1")["median@10"] == f"{expected:.4f}"
    assert cells(report, "1")["hit_ratio@3"] == f"{result['test']['hit_ratio@3']:.4f}"


def test_tables_have_it(data, tmp_path, monkeypatch):
    config = config_of("popularity")
    monkeypatch.setattr(table2, "load_dataset", lambda config: data)
    plan = table2.Study("x.py", lambda variant: config.copy_and_resolve_references(), {}, tmp_path)
    report = table2.run(plan, ["popularity"])
    (row,) = report["comparison"]
    result = json.loads((tmp_path / "popularity" / "seed_0" / "result.json").read_text())
    assert row["published"]["median"]["mean"] == result["test"]["median@10"]
    found = cells((tmp_path / "table2.md").read_text(), "popularity")
    for part, name in (("warm", "warm Median@10"), ("published", "all Median@10")):
        assert found[name] == f"{row[part]['median']['mean']:.4f}"
    assert found["warm HR@3"] != "-"


def test_files_and_plot_of_a_sweep_have_it(data, tmp_path, monkeypatch):
    config = tiny("popularity")
    swept = points.parse_grid(["config.epochs=1,2"], config)
    panels = []
    panel = sweep.sweep_report._panel
    monkeypatch.setattr(
        sweep.sweep_report,
        "_panel",
        lambda *args, **kw: panels.append(args[3]) or panel(*args, **kw),
    )
    rows = sweep.run(sweep.Sweep("x.py:popularity", config, {}, tmp_path, swept), data)
    with open(tmp_path / "sweep.csv", newline="") as file:
        stored = list(csv.DictReader(file))
    assert [float(row["median@10"]) for row in stored] == [row["median@10"] for row in rows]
    assert cells((tmp_path / "sweep.md").read_text(), "0")["median@10"] == (
        f"{rows[0]['median@10']:.4f}"
    )
    assert panels == ["hit_ratio@10", "ndcg@10", "mrr@10", *KEYS]
    assert (tmp_path / "sweep.png").stat().st_size > 0


def test_a_record_of_before_is_a_dash(data, tmp_path, monkeypatch):
    config = tiny("popularity")
    found = sweep.Sweep("x.py:popularity", config, {}, tmp_path, [{}])
    monkeypatch.setattr(metrics, "METRICS", METRICS)
    sweep.run(found, data)
    monkeypatch.setattr(metrics, "METRICS", (*METRICS, *ADDED))
    (row,) = sweep.run(found, data)
    assert row["median@10"] is None and row["ndcg@10"] > 0
    assert cells((tmp_path / "sweep.md").read_text(), "0")["median@10"] == "-"


def test_figures_have_it():
    epoch = {"valid_warm": dict.fromkeys(KEYS, 0.5), "epoch": 1, "train_loss": 0.7}
    epoch |= {"seconds": 1.0, "h_zeros": 0.0, "h_mean_abs": 0.1}
    assert set(KEYS) <= figures._numbers(epoch, 10).keys()
    panels = figures.FIGURES["2a"].panels(10)
    assert [panel.column for panel in panels][-2:] == [f"warm {key}" for key in KEYS]
    assert drawing.Panel("warm hit_ratio@3", "warm validation HR@3\n(best epoch)") in panels


def test_crossing_and_habits_have_it():
    ranks = ranking.Ranks(*np.array([[0, 7], [0, 1], [9, 9]]))
    summary = ranking.summarize(ranks, k=10)
    ways = {way: [summary] for way in crossing.WAYS}
    ndcg = {way: np.array([0.1, 0.2]) for way in crossing.WAYS}
    text = crossing.report(ways, ndcg, 10)
    assert [cells(text, "on")[name] for name in HEADINGS] == ["4.7500", "0.5000"]
    found = habits.figures([ranks], 1, habits.Habits(), k=10)
    assert found["median"] == 4.75 and found["hit_ratio@3"] == 0.5


def test_where_lower_is_better_the_best_epoch_on_test_is_the_lowest(monkeypatch):
    lower = ADDED[0]._replace(higher_is_better=False)
    monkeypatch.setattr(metrics, "METRICS", (*METRICS, lower))
    test = [ranking.Ranks(*np.array([[above], [0], [9]])) for above in (3, 1, 2)]
    found = habits.figures(test, 1, habits.Habits(epochs=True), k=10)
    assert found["median"] == 2.0 and found["hit_ratio"] == 1.0
