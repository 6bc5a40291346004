"""Thirty epochs of configs/amazon.py, validated and saved; peak memory is the process's."""

import tempfile
from pathlib import Path

from benchmarks import data
from benchmarks.report import Report
from conet_jax.run.fit import fit


def measure(report: Report, scale: str) -> None:
    """Times the run."""
    dataset = data.dataset(scale)
    config = data.recipe_of_amazon()
    config.update(name="benchmark", epochs=30, patience=30)
    with tempfile.TemporaryDirectory() as folder:
        result = fit(config, Path(folder) / "run", dataset=dataset)
    report.rates["run_seconds"] = result["seconds"]
    report.rates["run_seconds_per_epoch"] = result["seconds"] / result["epochs"]
