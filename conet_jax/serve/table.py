"""Recommendations as a table: a row each; and that table as text for people."""

import itertools
from typing import Any

import numpy as np
import polars as pl

from conet_jax.serve.explain import SOURCE_ITEMS
from conet_jax.serve.explain import columns as columns_of
from conet_jax.serve.recommender import Recommender, User


def table(
    recommender: Recommender,
    method: str,
    group: list[User],
    chosen: np.ndarray,
    scores: np.ndarray,
    explain: bool,
) -> pl.DataFrame:
    """The columns of ``recommend`` for users of one method.

    Args:
      recommender: from ``recommender.load``.
      method: of the users, see ``User``.
      group: the users.
      chosen: int[users, k], rows of items, best first.
      scores: f32[users, k], -inf where there is no further item.
      explain: whether there are columns of an explanation.

    Returns:
      A row a recommendation, ``place`` numbering the users.
    """
    places, ranks = np.nonzero(scores > -np.inf)
    found = scores[places, ranks].astype(np.float64)
    # Not by pl.repeat: it goes through Polars' engine, which takes longer than one user's list.
    unknown = pl.Series([None] * len(places), dtype=pl.Float64)
    values: dict[str, Any] = {"score": unknown if method == "popularity" else pl.Series(found)}
    if recommender.model.logits:
        # In float64: in float32 all logits above 17 would be 1.
        sigmoid = pl.Series(1 / (1 + np.exp(-found)))
        values = {"probability": unknown if method == "popularity" else sigmoid} | (
            values if explain else {}
        )
    ids = recommender.dataset.target_item_ids[chosen[places, ranks].astype(np.int64)].tolist()
    columns = {
        "place": places,
        "user": pl.Series([group[at].id for at in places], dtype=pl.String),
        "rank": (ranks + 1).astype(np.int32),
        "item": pl.Series(ids, dtype=pl.String),
        **values,
        "method": pl.Series([method] * len(places), dtype=pl.String),
    }
    if explain:
        parts = [
            columns_of(recommender, user, chosen[at, scores[at] > -np.inf])
            for at, user in enumerate(group)
        ]
        names = columns_of(recommender, User(""), np.empty(0, np.int64))
        columns |= {
            name: pl.Series(
                itertools.chain(*(part[name] for part in parts)),
                dtype=pl.String if name.startswith("source") else pl.Float64,
            )
            for name in names
        }
    return pl.DataFrame(columns)


def text(frame: pl.DataFrame) -> str:
    """A table of ``recommend`` for people to read."""
    lines = []
    width = max(4, frame["item"].str.len_chars().max() or 0)
    name = "probability" if "probability" in frame.columns else "score"
    for row in frame.iter_rows(named=True):
        if row["rank"] == 1:
            how = "" if row["method"] == "model" else f", by {row['method']}"
            lines += [f"user {row['user']}{how}", f"rank  {'item':{width}}  {name:>11}"]
        value = "" if row[name] is None else f"{row[name]:11.4f}"
        lines.append(f"{row['rank']:4d}  {row['item']:{width}}  {value}".rstrip())
        if "cross_score" in row and row["score"] is not None:
            crossing = row["cross_score"]
            parts = [f"score {row['score']:.4f}"]
            parts += [] if crossing is None else [f"crossing {crossing:+.4f}"]
            parts += [
                f"{row[f'source_{at}']} {row[f'weight_{at}']:+.4f}"
                for at in range(1, SOURCE_ITEMS + 1)
                if row[f"source_{at}"] is not None
            ]
            lines.append("      " + ", ".join(parts))
    return "".join(line + "\n" for line in lines)
