"""JAX's own settings that change a run's numbers: written down with it, and held to.

They come from the environment (``JAX_ENABLE_X64=1``) or from ``jax.config``; no config field knows
of them.
"""

from typing import Any

import jax

_USUAL = {
    "JAX_ENABLE_X64": False,
    "JAX_DEFAULT_PRNG_IMPL": "threefry2x32",
    "JAX_THREEFRY_PARTITIONABLE": True,
    "JAX_RANDOM_SEED_OFFSET": 0,
    "JAX_DEFAULT_MATMUL_PRECISION": None,
}


def current() -> dict[str, bool | int | str | None]:
    """Returns the settings in force, by the names of their environment variables.

    Example:
      >>> current()["JAX_ENABLE_X64"], current()["JAX_DEFAULT_PRNG_IMPL"]
      (False, 'threefry2x32')
    """
    return {name: getattr(jax.config, name.lower()) for name in _USUAL}


def unusual() -> dict[str, bool | int | str | None]:
    """Returns those of ``current`` that are not as JAX has them by itself.

    Example:
      >>> with jax.enable_x64(True):
      ...     unusual()
      {'JAX_ENABLE_X64': True}
    """
    return {name: value for name, value in current().items() if value != _USUAL[name]}


def differences(stored: dict[str, Any]) -> list[str]:
    """Settings that differ from those of a run.

    Args:
      stored: of the run, from ``current``; what is not in it is not compared.

    Returns:
      ["JAX_… is … there and … here", …], empty if they agree.

    Example:
      >>> differences({"JAX_ENABLE_X64": True})
      ['JAX_ENABLE_X64 is true there and false here']
    """
    return [
        f"{name} is {_said(stored[name])} there and {_said(value)} here"
        for name, value in current().items()
        if name in stored and stored[name] != value
    ]


def _said(value: Any) -> str:
    """A value as the environment variable has it."""
    return "unset" if value is None else str(value).lower()
