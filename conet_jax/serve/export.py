"""A trained model as files that need none of this package to be read.

- ``params.safetensors``: settled embedding tables and dense parameters;
- ``projected.safetensors``: the tables that ``score`` reads (at inference the first layer of a
  tower is linear in [user, item], so each table goes through it once);
- ``score.stablehlo``: the scoring function, by ``jax.export``, for any number of users and items;
- ``users.parquet``, ``target_items.parquet``, ``source_items.parquet``: the raw id of each row;
- ``export.json``: the run's config, data and versions, and what the scores are.

examples/score_without_conet_jax.py reads them.
"""

import importlib.util
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jax import export as jax_export

from conet_jax.data import store
from conet_jax.errors import InputError
from conet_jax.files import write_json
from conet_jax.models.base import Model, Params
from conet_jax.run.experiment import Experiment
from conet_jax.run.fit import versions
from conet_jax.train import ranking

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Leaves of a pytree by path.

    Example:
      >>> print(flat({"dense": {"h": jnp.ones(2)}, "user": jnp.zeros(1)}))
      {'dense/h': array([1., 1.], dtype=float32), 'user': array([0.], dtype=float32)}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.ascontiguousarray(leaf)
        for path, leaf in leaves
    }


def export_scores(model: Model, projected: Any) -> jax_export.Exported:
    """Exports ``Model.scores`` with symbolic sizes: b users, c items each.

    Args:
      model: the model.
      projected: from ``Model.project``.

    Returns:
      (``flat(projected)``, users int32[b], items int32[b, c]) -> f32[b, c].
    """
    treedef = jax.tree.structure(projected)
    tensors = flat(projected)
    names = list(tensors)

    def scores(tensors: dict[str, jax.Array], users: jax.Array, items: jax.Array) -> jax.Array:
        tree = jax.tree.unflatten(treedef, [tensors[name] for name in names])
        return model.scores(tree, users, items)

    b, c = jax_export.symbolic_shape("b, c")
    return jax_export.export(jax.jit(scores), platforms=PLATFORMS)(
        {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.items()},
        jax.ShapeDtypeStruct((b,), jnp.int32),
        jax.ShapeDtypeStruct((b, c), jnp.int32),
    )


def check_writable(directory: str | os.PathLike) -> None:
    """Says why ``save`` would refuse.

    Raises:
      InputError: something is there already, or the extra is not installed.
    """
    for name in ("flatbuffers", "safetensors"):  # jax.export serialises by the first
        if importlib.util.find_spec(name) is None:
            raise InputError(f"an export needs {name}: pip install 'conet-jax[export]'")
    store.check_new(directory)


def save(experiment: Experiment, params: Params, directory: str | os.PathLike) -> None:
    """Writes a model to a new folder, as a whole or not at all.

    Args:
      experiment: a run.
      params: settled parameters.
      directory: a new or empty folder.

    Raises:
      InputError: the folder is not empty or cannot be written, or the extra is not installed.
    """
    check_writable(directory)
    from safetensors.numpy import save as encode

    dataset = experiment.dataset
    projected = ranking.project(params, experiment.interactions, model=experiment.model)
    with store.new_folder(directory) as beside:
        (beside / "params.safetensors").write_bytes(encode(flat(params._asdict())))
        (beside / "projected.safetensors").write_bytes(encode(flat(projected)))
        exported = export_scores(experiment.model, projected)
        (beside / "score.stablehlo").write_bytes(exported.serialize())
        for name in ("user_ids", "target_item_ids", "source_item_ids"):
            ids = pl.Series("id", getattr(dataset, name).tolist(), dtype=pl.String)
            frame = pl.DataFrame(ids).with_row_index("row")
            frame.write_parquet(beside / f"{name.removesuffix('_ids')}s.parquet")
        about = {
            "config": json.loads(experiment.config.to_json()),
            "dataset_hash": dataset.meta["hash"],
            "scores": "logits" if experiment.model.logits else "scores that only order",
            "platforms": list(PLATFORMS),
            "versions": versions(),
        }
        write_json(beside / "export.json", about)
