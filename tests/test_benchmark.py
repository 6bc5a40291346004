"""The benchmark's report: the promised names, on small data. Speeds are not asserted."""

import json

import pytest
from test_launch import launch


@pytest.mark.slow
def test_report_has_the_promised_ratios_and_rates(tmp_path):
    file = tmp_path / "report.json"
    done = launch("benchmark", "--scale=small", "--runs=1", f"--json={file}")
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert {"machine", "results", "ratios", "rates"} == set(report)
    for row in report["results"]:
        assert {"name", "seconds", "runs", "items_per_second"} == set(row)
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
