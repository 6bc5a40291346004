"""Models by name. A new one is a module with ``build(options) -> Model`` and a line here."""

from typing import Any

from conet_jax.models import bprmf, cmf, conet, cross_stitch, ease, fm, ials, mlp, popularity
from conet_jax.models.base import Model

MODELS = {
    "conet": conet,
    "mlp": mlp,
    "cross_stitch": cross_stitch,
    "bprmf": bprmf,
    "cmf": cmf,
    "fm": fm,
    "ials": ials,
    "ease": ease,
    "popularity": popularity,
}


def options(module: Any, config: Any) -> Any:
    """Returns a model's ``Options`` from the config's fields of the same names."""
    names = [name for name in module.Options._fields if name in config]
    fields = {name: config[name] for name in names}
    if "layers" in fields:
        fields["layers"] = tuple(config.layers)
    if "dropout" in fields:  # the rate is traced: here stands whether there is any
        fields["dropout"] = config.dropout > 0
    return module.Options(**fields)


def build(config: Any) -> Model:
    """Returns the ``Model`` that a config names; its options are the config's fields."""
    module = MODELS[config.model]
    return module.build(options(module, config))
