"""Test set-up: strict JAX on the CPU, and where the real data stands."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported; child processes inherit it

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


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles quickly to slow code: for modules that spend nearly all of their time compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
