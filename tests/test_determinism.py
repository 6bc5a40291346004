"""The same command, data and seed give the same numbers, whatever the state of the machine."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import DEMO, ROOT

SMALL = {
    "num_users": 300,
    "num_target_items": 150,
    "num_source_items": 150,
    "target_interactions": 2400,
    "source_interactions": 4800,
}


def train(workdir, variant, *, cache=None):
    """Runs launch/train.py in a fresh process; returns all of its numbers but the seconds."""
    environment = {name: x for name, x in os.environ.items() if "CACHE" not in name}
    if cache is None:
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    else:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "launch" / "train.py")),
            f"{DEMO}:{variant}",
            "--config.epochs=3",
            *(f"--config.data.synthetic.{name}={value}" for name, value in SMALL.items()),
            f"--workdir={workdir}",
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((workdir / "result.json").read_text())
    for row in rows:
        del row["rows_per_second"]
    for numbers in (*rows, result):
        del numbers["seconds"]
    with np.load(workdir / "ranks.npz") as ranks:
        return rows, result, {name: array.tolist() for name, array in ranks.items()}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["recipe", "lasso", "ials_joined"])
def test_fresh_processes_give_the_same_numbers_bit_for_bit(tmp_path, variant):
    cache = tmp_path / "cache"
    runs = {
        "no cache of compiled programs": train(tmp_path / "none", variant),
        "an empty one": train(tmp_path / "cold", variant, cache=cache),
        "a full one": train(tmp_path / "warm", variant, cache=cache),
    }
    assert any(cache.iterdir())
    first = runs.pop("no cache of compiled programs")
    assert len(first[0]) >= 1
    for how, found in runs.items():
        for part, a, b in zip(("metrics.jsonl", "result.json", "ranks"), first, found, strict=True):
            assert a == b, (how, part)
