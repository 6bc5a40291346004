"""Scores pairs by an exported model; needs jax, flatbuffers, safetensors and polars, not conet_jax.

python examples/score_without_conet_jax.py EXPORTED_DIR USER_ID ITEM_ID [ITEM_ID ...]
"""

import sys
from pathlib import Path

import jax
import numpy as np
import polars as pl
from safetensors.numpy import load_file

folder, user, *items = sys.argv[1:]
folder = Path(folder)
tensors = load_file(folder / "projected.safetensors")
rows = {
    name: dict(pl.read_parquet(folder / f"{name}.parquet").select("id", "row").iter_rows())
    for name in ("users", "target_items")
}
score = jax.export.deserialize((folder / "score.stablehlo").read_bytes())

users = np.array([rows["users"][user]], np.int32)  # int32[b]
listed = np.array([[rows["target_items"][item] for item in items]], np.int32)  # int32[b, c]
scores = np.asarray(score.call(tensors, users, listed))  # f32[b, c]
for item, value in zip(items, scores[0].tolist(), strict=True):
    print(item, value)
assert "conet_jax" not in sys.modules
