"""Thirty epochs of configs/amazon.py, validated and saved; peak memory is the process's."""

import json
import tempfile
from pathlib import Path

from benchmarks import data
from benchmarks.report import Report
from conet_jax.run.fit import fit


def measure(report: Report, scale: str) -> None:
    """Times the run, and the search of its start."""
    dataset = data.dataset(scale)
    config = data.recipe_of_amazon()
    config.update(name="benchmark", epochs=30, patience=30)
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        result = fit(config, workdir, dataset=dataset)
        with open(workdir / "metrics.jsonl", encoding="utf-8") as lines:
            search = json.loads(next(lines))["seconds"]["search"]
    report.rates["run_seconds"] = result["seconds"]
    report.rates["run_seconds_per_epoch"] = result["seconds"] / result["epochs"]
    report.rates["search_seconds"] = search
    report.ratios["search_over_run"] = search / (search + result["seconds"])
