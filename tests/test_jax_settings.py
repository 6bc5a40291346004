"""JAX's settings that change numbers: written down with a run, which goes on under no others."""

import json
import os
import subprocess
import sys

import jax
import pytest
from helpers import ROOT, SMALL, assert_one_line_error, tiny

from conet_jax import cli
from conet_jax.errors import InputError
from conet_jax.run import jax_settings
from conet_jax.run.fit import fit
from conet_jax.studies import full_run, runner

_OTHERS = {
    "JAX_ENABLE_X64 is false there and true here": lambda: jax.enable_x64(True),
    "JAX_DEFAULT_PRNG_IMPL is threefry2x32 there and rbg here": lambda: jax.default_prng_impl(
        "rbg"
    ),
    "JAX_THREEFRY_PARTITIONABLE is true there and false here": lambda: jax.threefry_partitionable(
        False
    ),
    "JAX_DEFAULT_MATMUL_PRECISION is unset there and highest here": (
        lambda: jax.default_matmul_precision("highest")
    ),
}
others = pytest.mark.parametrize(("said", "other"), _OTHERS.items(), ids=lambda x: str(x)[:18])


def popular(**fields):
    config = tiny("popularity", **fields)
    config.data.synthetic = SMALL
    return config


@pytest.fixture
def run(tmp_path):
    fit(popular(), tmp_path / "run", quiet=True)
    return tmp_path / "run"


def test_settings_stand_in_the_workdir_from_the_start_and_in_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr("conet_jax.run.fit.initial_state", lambda experiment: 1 / 0)
    with jax.threefry_partitionable(False), pytest.raises(ZeroDivisionError):
        fit(popular(), tmp_path / "run", quiet=True)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["jax_settings"]
    assert stored["JAX_THREEFRY_PARTITIONABLE"] is False and stored["JAX_ENABLE_X64"] is False
    monkeypatch.undo()
    result = fit(popular(), tmp_path / "run", quiet=True)  # it had nothing to lose
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["jax_settings"]
    assert stored == jax_settings.current() == result["jax_settings"]
    assert stored["JAX_THREEFRY_PARTITIONABLE"] is True


@others
def test_run_goes_on_under_no_other_settings(run, said, other):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with other(), pytest.raises(InputError, match=said):
        fit(popular(epochs=5), run, quiet=True)
    assert before == {path: path.read_bytes() for path in before}
    fit(popular(epochs=5), run, quiet=True)


@others
def test_study_mixes_no_runs_of_other_settings(run, said, other):
    plan = full_run.plan(popular(), runner.load_dataset(popular()), run, "")
    assert full_run.read(plan)["test"]
    with other(), pytest.raises(InputError, match=said):
        full_run.read(plan)
    with other():
        assert runner.key(popular(), "digest") != plan.key
        key = runner.key(popular(), "digest")
    assert runner.key(popular(), "digest") != key


@pytest.mark.parametrize("file", ["config.json", "result.json"])
def test_run_of_before_they_were_kept_goes_on(run, file):
    stored = json.loads((run / file).read_text())
    del stored["jax_settings"]
    (run / file).write_text(json.dumps(stored))
    with jax.default_prng_impl("rbg"):
        if file == "config.json":
            fit(popular(), run, quiet=True)
        else:
            plan = full_run.plan(popular(), runner.load_dataset(popular()), run, "")
            assert full_run.read(plan)


def test_command_under_another_setting_is_one_line(tmp_path):
    config = cli.load_config_file(ROOT / "configs" / "demo.py").get_config("popularity")
    fit(config, tmp_path / "run", quiet=True)
    words = ["-m", "conet_jax", "train", "--config=demo:popularity", f"--workdir={tmp_path}/run"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_X64": "1"}
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    assert_one_line_error(done, "JAX_ENABLE_X64 is false there and true here", "Set them as there")
