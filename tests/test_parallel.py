"""One device against many, in processes of their own: results, memory, traffic, processes.

Each process has its own devices (``JAX_NUM_CPU_DEVICES``) and a time limit, so nothing hangs.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conet_jax.devices import capacity, processes
from conet_jax.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
from ml_collections import ConfigDict
from conet_jax.config import (default_config)


def get_config(variant=""):
    config = default_config(variant)
    config.ials_trials = 0
    config.update(name="tiny", layers=(16, 8, 4), cross_layers=2, batch_size=32, negatives=1)
    config.update(patience=99, folds=3, ials_sweeps=2, fold_sweeps=1)
    config.data.synthetic = ConfigDict(dict(
        num_users=120, num_target_items=220, num_source_items=150,
        target_interactions=900, source_interactions=1500, seed=0))
    return config
"""


def environment(devices):
    return os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        # Nearly all of the time is compilation.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }


def worker(tmp_path, name="out", **fields):
    out = tmp_path / f"{name}.npz"
    command = [sys.executable, ROOT / "tests" / "axis_worker.py", out, json.dumps(fields)]
    done = subprocess.run(
        command, env=environment(8), capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as arrays:
        return dict(arrays)


def assert_tables_equal(found, n, expected, atol):
    for name in ("user", "target_item", "source_item"):
        there = expected[f"table_{name}/1"]
        assert np.abs(there).max() > 0.1  # they were trained, or fitted
        np.testing.assert_allclose(found[f"table_{name}/{n}"], there, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """An epoch on one device and on eight, in float64; batches of 64."""
    return worker(tmp_path_factory.mktemp("axis"), devices=[1, 8], full=True, traffic=8)


def test_an_epoch_on_eight_devices_is_that_on_one(few):
    np.testing.assert_allclose(few["losses/8"], few["losses/1"], rtol=1e-10)
    assert_tables_equal(few, 8, few, 1e-10)
    np.testing.assert_allclose(few["diagnostics/8"], few["diagnostics/1"], rtol=1e-8, atol=1e-12)


def test_ranks_on_eight_devices_are_those_on_one(few):
    for name in ("above", "full_above", "full_candidates", "best_items"):
        np.testing.assert_array_equal(few[f"{name}/8"], few[f"{name}/1"])
    assert np.ptp(few["full_above/1"]) > 100


def test_a_device_holds_its_share_of_tables_and_their_moments(few):
    assert few["held/1"] == 1
    assert few["held/8"] <= 1.05 / 8


def test_no_collective_moves_more_than_the_rows_of_a_batch(few):
    """Read from the compiled step of 1,024 examples a domain; no table is as long as they are."""
    traffic = json.loads(str(few["traffic"]))
    assert traffic["rows_a_device"] == 128
    assert_bounded(traffic)


def assert_bounded(traffic):
    assert traffic["announced"] == pytest.approx(traffic["held"], rel=0.5)
    row = 8 * traffic["row_width"]  # float64
    sums = 4 * 8  # loss and count of each domain
    assert traffic["batch_rows"] == traffic["rows_a_device"] * 8

    def check(found, rows):
        assert {"all-to-all", "all-reduce"} <= {name for name, _ in found}
        for name, size in found:
            assert size <= (traffic["dense_bytes"] + sums if name == "all-reduce" else rows * row)

    check(traffic["collectives"], traffic["batch_rows"])
    # Where ids are spread evenly, the rows of a device's part, and some room.
    assert traffic["capacity"] < traffic["batch_rows"] / 3
    check(traffic["usual"], traffic["capacity"])


def test_a_start_is_searched_and_fitted_on_all_devices(tmp_path):
    fields = {"variant": "recipe", "ials_trials": 8, "layers": (16, 8, 4)}
    found = worker(tmp_path, devices=[1, 8], search=True, fields=fields)
    np.testing.assert_allclose(found["found/8"], found["found/1"], rtol=1e-6)
    assert len(found["found/1"]) == 5
    assert found["holds/8"] < 1.6 * found["holds/1"] / 8  # pairs are packed in blocks of one length
    # Of the other side come the rows of a block of pairs; sums are of Gram matrices.
    moved, room = json.loads(str(found["usual/8"])), 8 * capacity(int(found["block/8"]), 8)
    assert room < 0.75 * found["items/8"]
    assert {"all-to-all", "all-reduce"} <= {name for name, _ in moved}
    for name, size in moved:
        assert size <= 8 * 8 * (8 if name == "all-reduce" else room)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["recipe", "recipe_mlp", "recipe_joint_mlp"])
def test_variants_of_the_recipe_on_several_devices_are_those_on_one(variant, tmp_path):
    # Three devices divide neither rows nor batches.
    options = {"devices": [1, 3, 8], "fields": {"variant": variant}, "full": True, "traffic": 8}
    found = worker(tmp_path, **options)
    for n in (3, 8):
        np.testing.assert_allclose(found[f"losses/{n}"], found["losses/1"], rtol=1e-10)
        for name in ("above", "full_above", "full_candidates", "best_items"):
            np.testing.assert_array_equal(found[f"{name}/{n}"], found[f"{name}/1"])
        np.testing.assert_allclose(found[f"diagnostics/{n}"], found["diagnostics/1"], rtol=1e-8)
        assert found[f"held/{n}"] <= 1.05 / n
        if variant == "recipe":  # the others lack a table
            assert_tables_equal(found, n, found, 1e-10)
    assert_bounded(json.loads(str(found["traffic"])))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "fields", "room"),
    [
        # Batches that do not divide, and more rows asked of a device than there is usual room for.
        (3, {}, None),
        (4, {}, 1),
        (4, {"dropout": 0.3, "clip_norm": 0.1, "l2": 0.01, "cross_skip": 1}, None),
        (4, {"source_layers": (16, 9, 5), "cross_rank": 2}, None),
        (4, {"pairing": "random", "surplus": "alone", "l2": 0.1}, None),
        (4, {"model": "bprmf", "inference": "target", "l2": 0.01, "pairing": "random"}, None),
        (4, {"model": "cmf", "inference": "target", "pairing": "random", "l2": 0.01}, None),
        (4, {"model": "fm", "pairing": "random"}, None),
        (4, {"model": "mlp", "inference": "target", "cross_layers": 0}, None),
    ],
)
def test_other_models_and_batches_are_those_of_one_device(devices, fields, room, tmp_path):
    found = worker(tmp_path, devices=[1, devices], fields=fields, room=room)
    np.testing.assert_allclose(found[f"losses/{devices}"], found["losses/1"], rtol=1e-9)
    np.testing.assert_array_equal(found[f"above/{devices}"], found["above/1"])
    for name in [name for name in found if name.startswith("table_") and name.endswith("/1")]:
        other = found[name.removesuffix("1") + str(devices)]
        np.testing.assert_allclose(other, found[name], rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"pairing": "random"}, {"model": "bprmf"}])
def test_weights_on_several_devices_are_those_on_one(fields, tmp_path):
    if fields.get("model"):
        fields = fields | {"inference": "target", "pairing": "random"}
    found = worker(tmp_path, devices=[1, 3], fields=fields, weights=True)
    plain = worker(tmp_path, "plain", devices=[1], fields=fields)
    np.testing.assert_allclose(found["losses/3"], found["losses/1"], rtol=1e-9)
    assert (found["losses/1"] != plain["losses/1"]).all()


@pytest.mark.slow
def test_negatives_that_avoid_what_is_seen_are_those_of_one_device(tmp_path):
    fields = {"negatives_avoid_seen": True}
    found = worker(tmp_path, devices=[1, 3], fields=fields, seen=True)
    np.testing.assert_allclose(found["losses/3"], found["losses/1"], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("variant", ["recipe", "lasso"])
def test_two_hundred_steps_on_1_2_4_and_8_devices_are_the_same(variant, x64, tmp_path):
    fields = {"variant": variant}
    found = worker(tmp_path, devices=[1, 2, 4, 8], x64=x64, epochs=10, fields=fields)
    assert len(found["losses/1"]) >= 200
    for n in (2, 4, 8):
        if x64:
            np.testing.assert_allclose(found[f"losses/{n}"], found["losses/1"], rtol=0, atol=1e-10)
            assert_tables_equal(found, n, found, 1e-10)
        else:
            first = found[f"losses/{n}"][:20], found["losses/1"][:20]
            np.testing.assert_allclose(*first, rtol=1e-5)
            assert found[f"ndcg/{n}"] == pytest.approx(found["ndcg/1"], abs=0.01)


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_rows_agree(workdir, other, rtol=1e-10):
    rows, others = rows_of(workdir), rows_of(other)
    assert len(rows) == len(others) > 1
    for row, there in zip(rows, others, strict=True):
        for domain in ("target", "source"):
            loss = row["train_loss"][domain]
            assert loss == pytest.approx(there["train_loss"][domain], rel=rtol)
        assert row["valid"] == pytest.approx(there["valid"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["recipe", "lasso"])
def test_a_checkpoint_of_any_number_of_devices_goes_on_with_any_other(variant, tmp_path):
    options = {"devices": [], "fields": {"variant": variant}}
    # A start on other devices differs by roundings, which part items that score the same.
    wholes = [(str(tmp_path / f"whole{n}"), n, 3) for n in (8, 1, 2, 4)]
    worker(tmp_path, runs=wholes, **options)
    starts = [(str(tmp_path / f"from{n}"), n, 1) for n in (8, 1, 2, 4)]
    worker(tmp_path, runs=starts, **options)
    ends = []
    for n, others in ((8, (1, 2, 4)), (1, (8,)), (2, (8,)), (4, (8,))):
        for other in others:
            workdir = tmp_path / f"from{n}to{other}"
            shutil.copytree(tmp_path / f"from{n}", workdir)
            ends.append((str(workdir), other, 3))
    worker(tmp_path, runs=ends, **options)
    for workdir, _, _ in ends:
        begun = Path(workdir).name.partition("to")[0].removeprefix("from")
        assert_rows_agree(Path(workdir), tmp_path / f"whole{begun}")


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


class Processes:
    """launch/train.py as several processes on loopback."""

    def __init__(self, config, workdir, count, devices, *flags, x64=True):
        port, self.files, self.running = free_port(), [], []
        for i in range(count):
            joined = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
            joined = [*joined, f"--process_id={i}"] if count > 1 else []
            self.files.append(workdir.with_name(f"{workdir.name}.{i}.log").open("w+"))
            command = [sys.executable, ROOT / "launch" / "train.py", f"--config={config}"]
            env = environment(devices) | {"JAX_ENABLE_X64": str(int(x64))}
            self.running.append(
                subprocess.Popen(
                    [*command, f"--workdir={workdir}", *joined, *flags],
                    stdout=self.files[-1],
                    stderr=subprocess.STDOUT,
                    env=env,
                    cwd=ROOT,
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process, file in zip(self.running, self.files, strict=True):
            process.kill()
            process.wait()
            file.close()

    def printed(self, i):
        self.files[i].seek(0)
        return self.files[i].read()

    def wait(self, timeout=1800):
        for i, process in enumerate(self.running):
            assert process.wait(timeout) == 0, self.printed(i)[-3000:]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


def result_of(workdir):
    result = json.loads((workdir / "result.json").read_text())
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["recipe", "lasso"])
def test_two_processes_of_two_devices_are_one_of_four(variant, config, tmp_path):
    config = f"{config}:{variant}"
    one, two = tmp_path / "one", tmp_path / "two"
    flags = "--config.epochs=2", "--config.ials_trials=4"
    with Processes(config, one, 1, 4, *flags) as alone:
        alone.wait()
    with Processes(config, two, 2, 2, *flags) as both:
        both.wait()
        assert "epoch   2" in both.printed(0) and "epoch   2" not in both.printed(1)
    assert_rows_agree(two, one)
    assert result_of(two)["test"] == pytest.approx(result_of(one)["test"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "victim"), [("recipe", 0), ("recipe", 1), ("lasso", 1)])
def test_a_dead_peer_ends_the_run_and_a_restart_completes_it(variant, victim, config, tmp_path):
    config = f"{config}:{variant}"
    flags = ("--config.epochs=6",)
    with Processes(config, tmp_path / "undisturbed", 2, 1, *flags, x64=False) as both:
        both.wait()
    workdir = tmp_path / "killed"
    with Processes(config, workdir, 2, 1, *flags, x64=False) as both:
        metrics, until = workdir / "metrics.jsonl", time.monotonic() + 600
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            assert time.monotonic() < until, both.printed(0)[-3000:]
            time.sleep(0.05)
        both.running[victim].send_signal(signal.SIGKILL)
        killed, other = time.monotonic(), both.running[1 - victim]
        assert other.wait(60) != 0
        assert time.monotonic() - killed < 60
        assert not (workdir / "result.json").exists()  # it was killed in training
        for i in (victim, 1 - victim):  # a word of each, of a process that watched it
            while "another process of this run died" not in both.printed(i):
                assert time.monotonic() - killed < 60, both.printed(i)[-3000:]
                time.sleep(0.05)
        assert all("go on from the latest checkpoint" in both.printed(i) for i in (0, 1))
    with Processes(config, workdir, 2, 1, *flags, x64=False) as both:
        both.wait()
        assert "resuming after epoch" in both.printed(0)
    assert result_of(workdir) == result_of(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1", None, 0), "come together"),
        (("localhost:1", 2, 2), "expected 0 to 1"),
        (("localhost", 1, 0), "expected HOST:PORT"),
    ],
)
def test_processes_that_cannot_be_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        processes.start(*given)


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--num_processes=2", "come together"), ("--config.devices=3", "config.devices is 3")],
)
def test_flags_of_processes_and_devices_that_cannot_be_are_refused(flag, message, config, tmp_path):
    command = [sys.executable, ROOT / "launch" / "train.py", f"--config={config}:lasso", flag]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        env=environment(2),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
