"""Prepared data as RecBole's atomic files, and back: the same split for other libraries.

A folder a domain, as RecBole expects: ``target/target.{train,valid,test}.inter`` (its
``benchmark_filename``), ``source/source.inter``, and ``.user`` and ``.item`` files that list all
ids. What RecBole has no place for stands beside: ``candidates.parquet``, the negatives of each
held-out item, and ``dataset.json``, how the data were made.
"""

import json
import os
from pathlib import Path

import numpy as np
import polars as pl

from conet_jax.data import dataset as dataset_lib
from conet_jax.data import store
from conet_jax.data.dataset import DOMAINS, Dataset, HeldOut, Interactions
from conet_jax.errors import InputError

_HELD_OUT = ("valid", "test")


def settings(directory: str | os.PathLike) -> str:
    """RecBole's settings (YAML) for the target's split in a folder that ``save`` wrote.

    Example:
      >>> print(settings("/data/books"))
      data_path: /data/books
      dataset: target
      benchmark_filename: [train, valid, test]
      load_col: {inter: [user_id, item_id]}
    """
    return (
        f"data_path: {directory}\ndataset: target\nbenchmark_filename: [train, valid, test]\n"
        "load_col: {inter: [user_id, item_id]}"
    )


def save(dataset: Dataset, directory: str | os.PathLike) -> None:
    """Writes a data set to a new folder, as a whole or not at all.

    Args:
      dataset: the data.
      directory: a new or empty folder.

    Raises:
      InputError: the folder is not empty or cannot be written, or an id holds a tab or a newline,
        which the format has no way to write.
    """
    for names in (dataset.user_ids, dataset.target_item_ids, dataset.source_item_ids):
        for name in names:
            if not name or any(mark in name for mark in "\t\n\r"):
                raise InputError(f"id {name!r} cannot be written: expected no tab and no newline")
    with store.new_folder(directory) as beside:
        for domain in DOMAINS:
            (beside / domain).mkdir()
            items = getattr(dataset, f"{domain}_item_ids")
            _write(beside / domain / f"{domain}.user", user_id=dataset.user_ids)
            _write(beside / domain / f"{domain}.item", item_id=items)
            rows = getattr(dataset, domain)
            users = np.repeat(dataset.user_ids, np.diff(rows.indptr))
            name = f"{domain}.train" if domain == "target" else domain
            _write(beside / domain / f"{name}.inter", user_id=users, item_id=items[rows.indices])
        parts = []
        for part in _HELD_OUT:
            held_out: HeldOut = getattr(dataset, part)
            users = dataset.user_ids[held_out.users]
            items = dataset.target_item_ids[held_out.items]
            _write(beside / "target" / f"target.{part}.inter", user_id=users, item_id=items)
            listed = dataset.target_item_ids[held_out.candidates]
            parts.append(
                pl.DataFrame(
                    {
                        "part": pl.repeat(part, len(users), dtype=pl.String, eager=True),
                        "user_id": pl.Series(users.tolist(), dtype=pl.String),
                        "candidates": pl.Series(listed.tolist(), dtype=pl.List(pl.String)),
                        "counts": pl.Series(held_out.mask.tolist(), dtype=pl.List(pl.Boolean)),
                    }
                )
            )
        pl.concat(parts).write_parquet(beside / "candidates.parquet")
        text = json.dumps(dataset.meta, indent=2, sort_keys=True)
        (beside / "dataset.json").write_text(text + "\n", encoding="utf-8")


def load(directory: str | os.PathLike) -> Dataset:
    """Reads what ``save`` wrote.

    Args:
      directory: the folder.

    Returns:
      The data set that was saved, with the same hash; where interactions were changed since, the
      data set that there is now, with a hash of its own.

    Raises:
      InputError: a file is missing or cannot be read, an id is not listed, a pair stands twice, or
        a held-out user is not that of the candidates.
    """
    path = Path(directory)
    try:
        meta = json.loads((path / "dataset.json").read_text(encoding="utf-8"))
        candidates = pl.read_parquet(path / "candidates.parquet")
        report, options = meta["audit"], meta["options"]
    except (OSError, ValueError, KeyError, pl.exceptions.PolarsError) as error:
        raise InputError(
            f"{directory}: cannot be read as what launch/export.py --data writes ({error}); a "
            "single .inter file a domain is read by --target and --source"
        ) from None
    users = _read(path / "target" / "target.user", "user_id")["user_id"]
    items = {d: _read(path / d / f"{d}.item", "item_id")["item_id"] for d in DOMAINS}
    interactions, held_out = {}, {}
    for domain, name in (("target", "target.train"), ("source", "source")):
        file = path / domain / f"{name}.inter"
        pairs = np.stack(_rows(file, users, items[domain]), axis=1)
        distinct = np.unique(pairs, axis=0)  # sorted by user, then item
        if len(distinct) < len(pairs):
            raise InputError(f"{file}: {len(pairs) - len(distinct)} pairs stand there twice")
        degrees = np.bincount(distinct[:, 0], minlength=len(users))
        indptr = np.concatenate([[0], np.cumsum(degrees)]).astype(np.int32)
        interactions[domain] = Interactions(
            indptr, distinct[:, 1].astype(np.int32), len(items[domain])
        )
    for part in _HELD_OUT:
        file = path / "target" / f"target.{part}.inter"
        rows, chosen = _rows(file, users, items["target"])
        order = np.argsort(rows)
        listed = candidates.filter(part=part)
        listed_users = _codes(file, listed["user_id"], users)
        if (np.diff(rows[order]) == 0).any() or not np.array_equal(rows[order], listed_users):
            raise InputError(
                f"{file}: expected one item of each user that candidates.parquet has for {part}"
            )
        width = listed["candidates"].list.len().max() or 0
        names = listed["candidates"].explode(empty_as_null=False)
        drawn = _codes(file, names, items["target"]).reshape(len(listed), width)
        mask = np.array(listed["counts"].to_list(), bool).reshape(len(listed), width)
        arrays = (rows[order], chosen[order], drawn)
        held_out[part] = HeldOut(*(x.astype(np.int32) for x in arrays), mask)
    ids = tuple(np.array(x.to_list(), object) for x in (users, items["target"], items["source"]))
    return dataset_lib.from_split(interactions, **held_out, ids=ids, report=report, options=options)


def _write(path: Path, **columns: np.ndarray) -> None:
    frame = pl.DataFrame(
        {
            f"{name}:token": pl.Series(values.tolist(), dtype=pl.String)
            for name, values in columns.items()
        }
    )
    frame.write_csv(path, separator="\t", quote_style="never")


def _read(path: Path, *names: str) -> pl.DataFrame:
    try:
        frame = pl.read_csv(path, separator="\t", quote_char=None, infer_schema=False)
        return frame.select(pl.col(f"{name}:token").alias(name) for name in names)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        expected = " and ".join(f"{name}:token" for name in names)
        raise InputError(
            f"{path}: cannot be read: expected columns {expected} ({reason})"
        ) from None


def _rows(path: Path, users: pl.Series, items: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    frame = _read(path, "user_id", "item_id")
    return _codes(path, frame["user_id"], users), _codes(path, frame["item_id"], items)


def _codes(path: Path, names: pl.Series, known: pl.Series) -> np.ndarray:
    """Places int64[n] of ids in the list of those that are known."""
    table = pl.DataFrame({"id": known}).with_row_index("row")
    frame = pl.DataFrame({"id": names}).join(table, on="id", how="left", maintain_order="left")
    if frame["row"].null_count():
        name = frame.filter(pl.col("row").is_null())["id"][0]
        raise InputError(f"{path}: id {name!r} is not listed in the .user or .item file")
    return frame["row"].to_numpy().astype(np.int64)
