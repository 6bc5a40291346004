"""What several test files need: commands as they are typed, small data, small runs."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from conet_jax.config import default_config

ROOT = Path(__file__).resolve().parent.parent
DEMO = f"--config={ROOT / 'configs' / 'demo.py'}"

# Of ``synthetic.dataset``: the fewest users and items that a run of each model makes sense on.
SMALL = dict(
    num_users=60,
    num_target_items=130,
    num_source_items=120,
    target_interactions=420,
    source_interactions=500,
    seed=0,
)
# Enough for several steps an epoch, and for several devices.
MEDIUM = dict(
    num_users=120,
    num_target_items=220,
    num_source_items=150,
    target_interactions=900,
    source_interactions=1500,
    seed=0,
)


def launch(name, *arguments, cwd=ROOT, timeout=600):
    """Runs a launcher in a process of its own, and returns what ``subprocess.run`` does."""
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / f"{name}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=timeout,
    )


def assert_one_line_error(done, *fragments):
    """A launcher has refused its input: status 2, and one line on stderr that has the fragments."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for fragment in fragments:
        assert fragment in lines[0], lines[0]


def tiny(variant="lasso", *, layers=(16, 8, 4), **fields):
    """A config of a short run of small towers, crossed as far as they go."""
    config = default_config(variant)
    config.ials_trials = 0
    config.update(name="tiny", layers=layers, epochs=3, patience=3, batch_size=64)
    config.cross_layers = min(config.cross_layers, len(layers) - 1)
    config.update(fields)
    return config


def without_seconds(result):
    """A result, or rows of results, but for what depends on the clock."""
    if isinstance(result, list):
        return [without_seconds(row) for row in result]
    return {k: x for k, x in result.items() if k not in ("seconds", "rows_per_second")}


def as_if_trained(params):
    """Parameters in which nothing is zero or tied."""
    return jax.tree.map(
        lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size).reshape(x.shape)),
        params,
    )


def slow(value):
    """A value of ``parametrize`` whose test is slow."""
    return pytest.param(value, marks=pytest.mark.slow)
