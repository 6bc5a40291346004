"""What is logged of two towers each epoch: whether they live, and what crosses between them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from conet_jax.models.base import Batch
from conet_jax.models.towers import logit_spread


def of_towers(logits: dict[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
    """Returns ``logit_spread/<domain>``, largest minus smallest logit: 0 of a dead tower."""
    return {
        f"logit_spread/{domain}": logit_spread(own, getattr(batch, domain).weights)
        for domain, own in logits.items()
    }


def of_crossing(
    module: nn.Module,
    dense: Any,
    uncrossed: Any,
    target: jax.Array,
    source: jax.Array,
    *,
    cross_layers: int,
) -> dict[str, jax.Array]:
    """What the cross connections carry, for each crossed layer and direction.

    Args:
      module: two towers with ``transition`` (``conet.CoNet``).
      dense: its parameters.
      uncrossed: the same, under which nothing crosses.
      target: f32[n, p], inputs of the target tower.
      source: f32[n, p], inputs of the source tower.
      cross_layers: transitions that are crossed.

    Returns:
      For layer l: ``h_mean_abs/layer_l`` (mean absolute entry of H^l), ``h_zeros/layer_l``
      (fraction of exact zeros) and ``cross_ratio/<domain>/layer_l``, norm(H a_other) over
      norm(W a_own) over the batch, 0 where W a_own is. With an H for each direction the first two
      end in ``/to_target`` or ``/to_source``.
    """
    out: dict[str, jax.Array] = {}
    targets, sources = [target], [source]

    def transition(level: int, dense: Any) -> Any:
        method = type(module).transition
        return module.apply({"params": dense}, level, targets, sources, method=method)

    for level in range(cross_layers):
        name = f"layer_{level + 1}"
        for key, part in dense.items():
            if key.startswith("H_") and key.split("_")[-2] == str(level):
                _, *direction, _, skipped = key.split("_")
                suffix = "/".join([name, "_".join(direction)]) if direction else name
                suffix += f"/skips_{skipped}" if skipped != "0" else ""
                h = matrix(part)
                out[f"h_mean_abs/{suffix}"] = jnp.abs(h).mean()
                out[f"h_zeros/{suffix}"] = (h == 0).mean()
        with_other, alone = transition(level, dense), transition(level, uncrossed)
        for at, domain in enumerate(("target", "source")):
            own = alone[at] - dense[domain][f"W_{level}"]["bias"][None, :]
            crossed, kept = (jnp.linalg.norm(x) for x in (with_other[at] - alone[at], own))
            ratio = crossed / jnp.where(kept > 0, kept, 1)
            out[f"cross_ratio/{domain}/{name}"] = jnp.where(kept > 0, ratio, 0.0)
        targets.append(nn.relu(with_other[0]))
        sources.append(nn.relu(with_other[1]))
    return out


def matrix(connection: Any) -> jax.Array:
    """Returns the H^l of a ``conet.CrossConnection``'s parameters, f32[in, out]."""
    if "H" in connection:
        return connection["H"]["kernel"]
    return connection["V"]["kernel"] @ connection["U"]["kernel"]
