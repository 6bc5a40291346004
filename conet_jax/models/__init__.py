"""Models by name. A new one is a module with ``build(options) -> Model`` and a line here."""

from typing import Any

from conet_jax.models import conet, mlp
from conet_jax.models.base import Model


def _conet(config: Any) -> Model:
    return conet.build(
        conet.Options(
            layers=tuple(config.layers),
            cross_layers=config.cross_layers,
            cross_per_direction=config.cross_per_direction,
            cross_rank=config.cross_rank,
            inner_product=config.inner_product,
            inner_weight=config.inner_weight,
            output_bias=config.output_bias,
            output_scale=config.output_scale,
            initializer=config.initializer,
            dropout=config.dropout > 0,
            pairing=config.pairing,
            inference=config.inference,
        )
    )


def _mlp(config: Any) -> Model:
    return mlp.build(
        mlp.Options(
            layers=tuple(config.layers),
            inner_product=config.inner_product,
            inner_weight=config.inner_weight,
            output_bias=config.output_bias,
            output_scale=config.output_scale,
            initializer=config.initializer,
            dropout=config.dropout > 0,
        )
    )


MODELS = {"conet": _conet, "mlp": _mlp}


def build(config: Any) -> Model:
    """Returns the ``Model`` that a config names and describes."""
    return MODELS[config.model](config)
