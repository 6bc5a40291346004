"""Runs from config to result files: contents, resume, refusals."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import DEMO, MEDIUM, ROOT, tiny, without_seconds

from conet_jax.data import synthetic
from conet_jax.errors import InputError
from conet_jax.run.checkpoints import Checkpoints
from conet_jax.run.experiment import make_experiment
from conet_jax.run.fit import fit
from conet_jax.run.start import initial_state
from conet_jax.run.workdir import stored_config
from conet_jax.train import ranking
from conet_jax.train.state import settled


@pytest.fixture(scope="module")
def data():
    return synthetic.dataset(**MEDIUM)[0]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    result = fit(tiny(), workdir, dataset=data)
    return workdir, result


def test_result_file_has_the_promised_fields(finished, data):
    workdir, result = finished
    assert json.loads((workdir / "result.json").read_text()) == result
    for split in ("test", "valid"):
        at_cuts = ("hit_ratio", "ndcg", "mrr", "mrr_published")
        cut = {f"{name}@{k}" for name in at_cuts for k in (5, 10, 20)}
        assert set(result[split]) == {*cut, "auc", "users"}
        assert result[split]["users"] == len(getattr(data, split).users)
    assert result["dataset"]["hash"] == data.meta["hash"]
    assert result["dataset"]["users"] == 120
    assert 1 <= result["best_epoch"] <= result["epochs"] <= 3
    assert result["seed"] == 0
    assert result["config"]["layers"] == [16, 8, 4]
    assert result["seconds"] > 0
    assert result["versions"]["jax"]
    # Tables of 120 + 220 + 150 rows of 8; towers 16-8-4-1 with biases; H of 16 x 8 and 8 x 4.
    tower = 16 * 8 + 8 + 8 * 4 + 4 + 4 + 1
    assert result["parameters"] == 490 * 8 + 2 * tower + 16 * 8 + 8 * 4
    page = (workdir / "result.md").read_text()
    of_split, of_other_cuts = [line for line in page.splitlines() if line.startswith("| test |")]
    names = ("hit_ratio@10", "ndcg@10", "mrr@10", "mrr_published@10", "auc")
    others = [f"{name}@{k}" for k in (5, 20) for name in at_cuts[:3]]
    for line, shown in ((of_split, names), (of_other_cuts, others)):
        cells = ["test", "120", *(f"{result['test'][name]:.4f}" for name in shown)]
        assert line == f"| {' | '.join(cells)} |"
    found = result["lists"]
    assert list(found)[:2] == ["users", "k"] and (found["users"], found["k"]) == (120, 10)
    shown = [f"{found[name]:.4f}" for name in list(found)[2:]]
    assert f"| first 10 | 120 | {' | '.join(shown)} |" in page


def test_metrics_file_has_a_row_an_epoch(finished):
    workdir, result = finished
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, result["epochs"] + 1))
    for row in rows:
        assert set(row["train_loss"]) == {"target", "source"}
        assert row["rows_per_second"] > 0
        assert {"train", "validation", "total"} <= set(row["seconds"])
        diagnostics = row["diagnostics"]
        for layer in ("layer_1", "layer_2"):
            assert diagnostics[f"h_mean_abs/{layer}"] >= 0
            assert 0 <= diagnostics[f"h_zeros/{layer}"] <= 1
            for domain in ("target", "source"):
                assert diagnostics[f"cross_ratio/{domain}/{layer}"] >= 0
    best = max(rows, key=lambda row: row["valid"]["ndcg@10"])
    assert best["epoch"] == result["best_epoch"]
    assert best["valid"] == pytest.approx(result["valid"], abs=1e-12)


def test_restored_checkpoint_reproduces_the_result(finished):
    workdir, result = finished
    config = json.loads((workdir / "config.json").read_text())
    assert config["dataset_hash"] == result["dataset"]["hash"]
    experiment = make_experiment(tiny(), synthetic.dataset(**MEDIUM)[0])
    checkpoints = Checkpoints(workdir / "checkpoints")
    like = jax.eval_shape(settled, initial_state(experiment), experiment.hyper.learning_rate)
    params = checkpoints.restore_best(result["best_epoch"], like)
    checkpoints.close()
    ranks = ranking.rank_held_out(
        experiment.model, params, experiment.interactions, experiment.dataset.test
    )
    assert ranking.summarize(ranks, k=(10, 5, 20)) == result["test"]


def test_same_command_again_changes_nothing(finished, data):
    workdir, result = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    again = fit(tiny(), workdir, dataset=data)
    assert without_seconds(again) == without_seconds(result)
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_two_runs_of_one_seed_are_one_run(finished, data, tmp_path):
    _, result = finished
    again = fit(tiny(), tmp_path / "again", dataset=data)
    assert without_seconds(again) == without_seconds(result)
    other = fit(tiny(seed=1), tmp_path / "other", dataset=data)
    assert other["test"] != result["test"]


def test_run_stopped_after_an_epoch_resumes_to_the_same_result(finished, data, tmp_path):
    _, result = finished
    fit(tiny(epochs=1), tmp_path / "run", dataset=data)
    resumed = fit(tiny(), tmp_path / "run", dataset=data)
    assert without_seconds(resumed) == without_seconds(result)


@pytest.mark.parametrize("epoch", [2, 3])
def test_failure_while_an_epoch_is_saved_resumes_to_the_same_result(
    finished, data, tmp_path, monkeypatch, epoch
):
    _, result = finished

    class Crash(Exception):
        pass

    save = Checkpoints.save_latest

    def crash(self, at, state, progress):
        if at == epoch:
            raise Crash
        save(self, at, state, progress)

    monkeypatch.setattr(Checkpoints, "save_latest", crash)
    with pytest.raises(Crash):
        fit(tiny(), tmp_path / "run", dataset=data)
    monkeypatch.setattr(Checkpoints, "save_latest", save)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 9, "half a li')
    resumed = fit(tiny(), tmp_path / "run", dataset=data)
    assert without_seconds(resumed) == without_seconds(result)
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_patience_may_change_when_a_run_goes_on(data, tmp_path):
    # A validation NDCG that never gets better than after the first epoch.
    config = partial(tiny, learning_rate=1e-12, epochs=9)
    stopped = fit(config(patience=1), tmp_path / "run", dataset=data, quiet=True)
    assert (stopped["best_epoch"], stopped["epochs"]) == (1, 2)
    longer = fit(config(patience=3), tmp_path / "run", dataset=data, quiet=True)
    assert (longer["best_epoch"], longer["epochs"]) == (1, 4)
    assert longer["config"]["patience"] == 3
    at_once = fit(config(patience=3), tmp_path / "at_once", dataset=data, quiet=True)
    assert without_seconds(longer) == without_seconds(at_once)


def test_cuts_but_the_first_may_change_when_a_run_goes_on(finished, data, tmp_path):
    _, result = finished
    fit(tiny(epochs=1, eval_k=(10,)), tmp_path / "run", dataset=data, quiet=True)
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    assert stored["eval_k"] == [10]
    path.write_text(json.dumps(stored | {"eval_k": 10}))  # as it was before there were several
    assert stored_config(tmp_path / "run")[0]["eval_k"] == (10,)
    with pytest.raises(InputError, match="eval_k begins with 10 there and with 5 here"):
        fit(tiny(eval_k=(5, 10)), tmp_path / "run", dataset=data)
    assert json.loads(path.read_text())["eval_k"] == 10
    resumed = fit(tiny(), tmp_path / "run", dataset=data, quiet=True)
    assert without_seconds(resumed) == without_seconds(result)
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["ndcg@20" in row["valid"] for row in rows] == [False, True, True]


def test_first_cut_chooses_the_epoch(data, tmp_path):
    for k in (1, 20):
        result = fit(tiny(eval_k=(k, 10), learning_rate=0.02), tmp_path / f"{k}", dataset=data)
        lines = (tmp_path / f"{k}" / "metrics.jsonl").read_text().splitlines()
        values = [json.loads(line)["valid_warm"][f"ndcg@{k}"] for line in lines]
        assert result["best_epoch"] == 1 + int(np.argmax(values))
        assert result["lists"]["k"] == k


def test_workdir_of_another_config_is_refused_by_field(finished, data):
    workdir, _ = finished
    with pytest.raises(InputError, match=r"config\.learning_rate is 0\.001 there and 0\.01 here"):
        fit(tiny(learning_rate=0.01), workdir, dataset=data)


def test_workdir_of_other_data_is_refused(finished):
    workdir, _ = finished
    other = synthetic.dataset(**{**MEDIUM, "seed": 1})[0]
    with pytest.raises(InputError, match="other data"):
        fit(tiny(), workdir, dataset=other)


def test_folder_that_is_no_run_is_refused(data, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds no run"):
        fit(tiny(), tmp_path, dataset=data)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_fewer_epochs_than_were_done_are_refused(finished, data):
    workdir, _ = finished
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(InputError, match=r"config\.epochs is 1, but the run .* has done 3"):
        fit(tiny(epochs=1), workdir, dataset=data)
    assert (workdir / "config.json").read_bytes() == before


def test_damaged_checkpoint_is_named(data, tmp_path):
    fit(tiny(epochs=1), tmp_path / "run", dataset=data)
    for file in (tmp_path / "run" / "checkpoints" / "latest" / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(InputError, match="the checkpoint in .*latest/1 is damaged"):
        fit(tiny(epochs=2), tmp_path / "run", dataset=data)


def test_run_that_failed_before_a_checkpoint_can_start_anew(finished, data, tmp_path):
    with pytest.raises(InputError, match="not finite"):
        fit(tiny("conet", learning_rate=1e30), tmp_path / "run", dataset=data)
    (tmp_path / "run" / ".config.json.tmp").write_text("{")
    result = fit(tiny(), tmp_path / "run", dataset=data)
    assert without_seconds(result) == without_seconds(finished[1])


def test_dead_tower_is_named(data, tmp_path, capsys):
    # Of so small a loss every gradient is below the eps of Adam, as that of a mean loss was.
    config = tiny("conet", initializer="gaussian", loss_scale=1e-3, epochs=1)
    fit(config, tmp_path / "run", dataset=data)
    printed = capsys.readouterr().out
    assert "the target tower is dead" in printed and "the source tower is dead" in printed
    assert "config.initializer=he" in printed


def test_infinite_loss_stops_before_the_state_is_saved(data, tmp_path):
    config = tiny("conet", learning_rate=1e30, epochs=2)
    with pytest.raises(InputError, match=r"(target|source) loss is not finite at step \d+"):
        fit(config, tmp_path / "run", dataset=data)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.latest_epoch() is None
    checkpoints.close()


def test_random_pairs_train_and_evaluate(data, tmp_path):
    config = tiny("conet", pairing="random", epochs=1, inference="cross")
    assert fit(config, tmp_path / "run", dataset=data)["epochs"] == 1


@pytest.mark.parametrize("variant", ["recipe", "mlp", "published", "published_mlp"])
def test_every_kind_of_variant_trains_and_evaluates(data, tmp_path, variant):
    result = fit(tiny(variant, epochs=1, patience=1), tmp_path / "run", dataset=data)
    assert result["test"]["users"] == 120


def _demo(workdir, *extra):
    return [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        DEMO,
        f"--workdir={workdir}",
        "--config.epochs=12",
        "--config.patience=12",
        *extra,
    ]


@pytest.mark.slow
def test_ten_kills_at_random_moments_resume_to_the_same_result(tmp_path):
    def run(workdir):
        subprocess.run(_demo(workdir), check=True, capture_output=True)
        return without_seconds(json.loads((workdir / "result.json").read_text()))

    expected = run(tmp_path / "compiles")
    started = time.monotonic()
    assert run(tmp_path / "undisturbed") == expected
    usual = time.monotonic() - started
    rng = random.Random(0)
    killed = 0
    for attempt in range(40):
        if killed == 10:
            break
        workdir = tmp_path / f"killed{attempt}"
        process = subprocess.Popen(
            _demo(workdir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.1, 1.0) * usual)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        else:
            usual *= 0.7  # it had ended: other jobs have left the machine since it was timed
        process.wait()
        for path in workdir.rglob("*.json"):
            json.loads(path.read_text())
        assert run(workdir) == expected
    assert killed == 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_programs_are_forgotten_before_memory_mappings_run_out(data, tmp_path, monkeypatch):
    traced = []

    @jax.jit
    def program(x):
        traced.append(1)  # once for each compiled program
        return x + 1

    limit = tmp_path / "max_map_count"
    monkeypatch.setattr("conet_jax.run.memory._MAPPINGS_ALLOWED", limit)
    taken = Path("/proc/self/maps").read_bytes().count(b"\n")
    for allowed, programs in ((100 * taken, 1), (taken, 2)):  # far from half of them, past it
        limit.write_text(f"{allowed}\n")
        program(1.0)
        make_experiment(tiny("popularity"), data)
        program(1.0)
        assert len(traced) == programs
