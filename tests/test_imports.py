"""The modules for re-use stand alone: they pull in no framework and define no flag."""

import subprocess
import sys

import pytest

_CODE = """
import sys
import optax
from absl import flags

before = set(flags.FLAGS)  # absl's own, and those of optax's dependencies
import conet_jax.{module}

heavy = ("orbax", "polars", "rich", "ml_collections", "flax")
loaded = sorted(name for name in sys.modules if name.split(".")[0] in heavy)
assert not loaded, loaded
ours = sorted(name for name in sys.modules if name.startswith("conet_jax"))
assert ours == ["conet_jax", "conet_jax.{module}"], ours
assert set(flags.FLAGS) == before, set(flags.FLAGS) - before
"""


@pytest.mark.parametrize("module", ["losses", "metrics", "optimizers", "row_adam"])
def test_module_for_reuse_loads_nothing_heavy_and_defines_no_flag(module):
    code = _CODE.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
