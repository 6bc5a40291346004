"""Models by name. A new one is a module with ``build(options) -> Model`` and a line here."""

from typing import Any

from conet_jax.models import conet, mlp
from conet_jax.models.base import Model

MODELS = {"conet": conet, "mlp": mlp}


def build(config: Any) -> Model:
    """Returns the ``Model`` that a config names; its options are the config's fields."""
    module = MODELS[config.model]
    fields = {name: config[name] for name in module.Options._fields}
    fields |= {"layers": tuple(config.layers), "dropout": config.dropout > 0}
    return module.build(module.Options(**fields))
