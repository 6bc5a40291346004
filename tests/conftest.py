"""Test set-up: strict JAX on the CPU, and where the real data stands."""

import atexit
import os
import pathlib
import shutil
import signal
import tempfile

# Before jax is imported; child processes inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Nearly all of the time of these tests is compilation, often of the same program ...
    _cache = tempfile.mkdtemp(prefix="conet_jax-compiled-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# ... which takes half as long to slower code. 0 is what users have; .ci/run --slow asks for it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent

# A forgotten axis is an error rather than a silent outer product.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """Folder of the real data sets: ``$CONET_DATA``, or ``../shared/data`` beside the checkout."""
    folder = pathlib.Path(os.environ.get("CONET_DATA") or _ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; CONET_DATA names its folder")
    return folder


@pytest.fixture
def hangups():
    """SIGHUP ends processes, in tests that run under ``nohup`` too: children inherit what is."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
