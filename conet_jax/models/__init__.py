"""Models by name. A new one is a file with ``Options`` and ``build(options)``, and a line here."""

from importlib import import_module
from typing import Any

from conet_jax.errors import InputError
from conet_jax.models.base import FittedModel, Model

# A file of this folder each.
NAMES = (
    "conet",
    "recipe",
    "recipe_mlp",
    "mlp",
    "cross_stitch",
    "bprmf",
    "cmf",
    "fm",
    "lightgcn",
    "ials",
    "ease",
    "ease_bridged",
    "emcdr",
    "popularity",
)
MODELS = {name: import_module(f"{__name__}.{name}") for name in NAMES}


def options(module: Any, config: Any) -> Any:
    """Returns a model's ``Options`` from the config's fields of the same names."""
    fields = {name: config[name] for name in module.Options._fields if name in config}
    fields = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in fields.items()}
    if "dropout" in fields:  # the rate is traced: here stands whether there is any
        fields["dropout"] = config.dropout > 0
    return module.Options(**fields)


def build(config: Any) -> Model | FittedModel:
    """Returns the model that a config names; its options are the config's fields."""
    module = MODELS[config.model]
    return module.build(options(module, config))


def factorisation(config: Any) -> Any:
    """Returns the ``ials.Options`` of the factorisation that a config's model is, or starts from.

    None for a model without one.
    """
    return getattr(options(MODELS[config.model], config), "factorisation", None)


def tuned_fields(config: Any) -> tuple[str, ...]:
    """Returns the config fields that a model's start tunes by itself (``run.tune``)."""
    if (found := factorisation(config)) is None:
        return ()
    has_neighbours = getattr(options(MODELS[config.model], config), "neighbours", 0) > 0
    return (*found.constants(), *["neighbour_weight"] * has_neighbours)


def check(config: Any) -> None:
    """Raises ``InputError`` where the config names no model, or has fields that do not fit it.

    What a model can check of its own fields is its ``check(config)``.
    """
    if config.model not in MODELS:
        raise InputError(f"config.model is {config.model!r}: expected one of {', '.join(MODELS)}")
    module = MODELS[config.model]
    if config.dtype != "float32" and "dtype" not in module.Options._fields:
        raise InputError(
            f"config.dtype is {config.dtype!r}: expected float32 with config.model={config.model}, "
            "which has no towers"
        )
    if config.pretrain_epochs and config.model not in ("conet", "mlp", "cross_stitch"):
        raise InputError(
            f"config.pretrain_epochs is {config.pretrain_epochs}: expected 0 with "
            f"config.model={config.model}; it is for conet, mlp and cross_stitch"
        )
    if hasattr(module, "check"):
        module.check(config)
