"""CoNet: collaborative cross networks for cross-domain recommendation, in JAX."""

import importlib
from typing import Any

__version__ = "0.2.0"
# What is imported only once it is asked for: by name, the module that has it.
_LATER = {
    "prepare": "conet_jax.data.prepare",
    "fit": "conet_jax.serve.fitted",
    "load": "conet_jax.serve.fitted",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
