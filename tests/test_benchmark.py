"""The benchmark's report: the promised names, on small data. Speeds are not asserted."""

import json
import re
import tomllib

import pytest
from helpers import ROOT, launch

from benchmarks import scaling
from benchmarks.data import SCALES
from benchmarks.suites import SCALES as NAMES


@pytest.mark.slow
def test_report_has_the_promised_ratios_and_rates(tmp_path):
    file = tmp_path / "report.json"
    done = launch("benchmark", "--scale=small", "--runs=1", f"--json={file}")
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert {"machine", "results", "ratios", "rates"} == set(report)
    for row in report["results"]:
        assert {"name", "seconds", "cpu_seconds", "runs", "items_per_second"} == set(row)
        assert row["seconds"] * row["items_per_second"] == pytest.approx(1)
    assert {
        "train_step_dense_over_row",
        "train_step_dense_over_row_same_user",
        "train_step_tables_x4",
        "train_step_bfloat16",
        "epoch_over_steps",
        "evaluate_loop_over_vmap",
        "evaluate_memory_x4",
        "population_8_over_1",
        "population_8_over_1_with_compilation",
        "population_recipe_27_over_27_runs",
    } <= set(report["ratios"])
    assert {
        "train_rows_per_second",
        "eval_pairs_per_second",
        "full_ranking_pairs_per_second",
        "recommend_users_per_second",
        "recommend_one_user_ms",
        "prepare_seconds",
        "prepare_peak_gib",
    } <= set(report["rates"])
    assert "train_step_dense_over_row" in done.stdout
    assert report["ratios"]["evaluate_memory_x4"] <= 1.5


@pytest.mark.slow
def test_report_of_many_devices_has_exchange_and_memory_of_each(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # nearly all of it is compilation
    file = tmp_path / "report.json"
    flags = ("--suite=scaling", "--scale=small", "--runs=1", f"--json={file}")
    done = launch("benchmark", *flags, timeout=1800)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    for variant, batch in scaling.SCALING:
        one, *several = (
            {
                name.removeprefix(prefix): value
                for name, value in report["rates"].items()
                if name.startswith(prefix)
            }
            for prefix in (
                f"scaling_{variant or 'recipe'}_batch_{batch}_devices_{n}_" for n in scaling.DEVICES
            )
        )
        assert one["bytes_exchanged"] == one["bytes_of_largest"] == 0
        for n, many in zip(scaling.DEVICES[1:], several, strict=True):
            assert 0 < many["bytes_of_largest"] < many["bytes_exchanged"]
            assert many["bytes_of_tables"] <= 1.05 / n * one["bytes_of_tables"]
            assert 1 <= many["busiest_over_mean"] < 1.2
    assert {"scaling_mapped_over_plain_jit", "scaling_mapped_over_pmap"} <= set(report["ratios"])


def test_the_flag_offers_the_scales_that_there_are():
    assert NAMES == tuple(SCALES)


def test_neither_the_package_nor_its_wheel_knows_of_the_benchmarks():
    for path in ROOT.glob("conet_jax/**/*.py"):
        assert not re.search(r"^\s*(from|import) benchmarks", path.read_text(), re.MULTILINE), path
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert wheel["targets"]["wheel"]["only-include"] == ["conet_jax", "launch", "configs"]
    assert wheel["targets"]["wheel"]["exclude"] == ["launch/benchmark.py"]
