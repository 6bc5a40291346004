"""Prepared data as RecBole's atomic files, and back: the same split for other libraries.

A folder a domain, as RecBole expects: ``target/target.{train,valid,test}.inter`` (its
``benchmark_filename``), ``source/source.inter``, and ``.user`` and ``.item`` files that list all
ids; further held-out parts in files of their names, as ``source/source.test_source.inter``. What
RecBole has no place for stands beside: ``candidates.parquet``, the negatives of each held-out item,
and ``dataset.json``, how the data were made.
"""

import array
import json
import os
from pathlib import Path

import numpy as np
import polars as pl

from conet_jax import files
from conet_jax.data import formats, lines, readers, store, values
from conet_jax.data.assemble import from_split
from conet_jax.data.types import (
    DOMAINS,
    HELD_OUT,
    KINDS,
    Dataset,
    HeldOut,
    UserItems,
    content_hash,
    held_out_parts,
)
from conet_jax.errors import InputError

_SEEN = "target.seen.inter"  # pairs below the threshold
_WEIGHT = "weight:float"  # of a training pair, of data that have weights
_CANDIDATES = {
    "part": pl.String,
    "user_id": pl.String,
    "candidates": pl.List(pl.String),
    "counts": pl.List(pl.Boolean),
}
_POLARS = (pl.exceptions.PolarsError, pl.exceptions.PanicException)  # the latter by altered files


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
            file = beside / domain / f"{name}.inter"
            _write(file, rows.weights, user_id=users, item_id=items[rows.indices])
        parts = []
        for part, held_out in held_out_parts(dataset).items():
            domain = HELD_OUT[part]
            ids = getattr(dataset, f"{domain}_item_ids")
            users, items = dataset.user_ids[held_out.users], ids[held_out.items]
            _write(beside / domain / f"{domain}.{part}.inter", user_id=users, item_id=items)
            listed = ids[held_out.candidates]
            columns = [part] * len(users), users, listed, held_out.mask
            values = zip(_CANDIDATES, (list(values) for values in columns), strict=True)
            parts.append(pl.DataFrame(dict(values), schema=_CANDIDATES))
        pl.concat(parts).write_parquet(beside / "candidates.parquet")
        if dataset.seen is not None:
            users = np.repeat(dataset.user_ids, np.diff(dataset.seen.indptr))
            items = dataset.target_item_ids[dataset.seen.indices]
            _write(beside / "target" / _SEEN, user_id=users, item_id=items)
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
    if not path.is_dir():
        raise InputError(
            f"{directory}: no such folder: expected what launch/export.py --data writes"
        )
    try:
        meta = files.read_json(path / "dataset.json")
        with files.open_regular(path / "candidates.parquet") as file:
            candidates = pl.read_parquet(file)
        report, options = meta["audit"], meta["options"]
        only = tuple(int(meta["counts"].get(kind, 0)) for kind in KINDS[1:])
        if not type(report) is type(options) is dict or candidates.schema != _CANDIDATES:
            raise ValueError("a field or column is of another type")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, *_POLARS) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{directory}: cannot be read as what launch/export.py --data writes ({reason}); a "
            "single .inter file a domain is read by --target and --source"
        ) from None
    users = _listed(path / "target" / "target.user", "user_id")
    items = {d: _listed(path / d / f"{d}.item", "item_id") for d in DOMAINS}
    if _listed(path / "source" / "source.user", "user_id") != users:
        raise InputError(
            f"{path / 'source' / 'source.user'}: other users than in target.user: expected the same"
        )
    pairs, interactions, held_out = {}, {}, {}
    for domain, name in (("target", "target.train"), ("source", "source")):
        file = path / domain / f"{name}.inter"
        pairs[domain] = np.stack(_rows(file, users, items[domain]), axis=1)
        distinct, at = np.unique(pairs[domain], axis=0, return_index=True)  # by user, then item
        if len(distinct) < len(pairs[domain]):
            twice = len(pairs[domain]) - len(distinct)
            raise InputError(f"{file}: {twice:,} pairs stand there twice: expected each once")
        weights = _weights(file)
        weights = None if weights is None else weights[at]
        interactions[domain] = _csr(distinct, len(users), len(items[domain]), weights)
    sizes = {d: len(items[d]) for d in DOMAINS}
    positives = {d: pairs[d] @ [sizes[d], 1] for d in DOMAINS}
    for part, domain in HELD_OUT.items():
        file = path / domain / f"{domain}.{part}.inter"
        if part not in ("valid", "test") and not file.exists():
            continue
        rows, chosen = _rows(file, users, items[domain])
        order = np.lexsort((chosen, rows))  # as they were written
        rows, chosen = rows[order], chosen[order]
        listed = candidates.filter(part=part)
        wanted = [users.get(user, -1) for user in listed["user_id"].to_list()]
        keys = rows * sizes[domain] + chosen
        if (np.diff(keys) == 0).any() or rows.tolist() != wanted:
            raise InputError(
                f"{file}: expected an item for each list that candidates.parquet has for {part}, "
                "of the same users, and none twice"
            )
        if np.isin(keys, positives[domain]).any():
            raise InputError(
                f"{file}: a pair stands in the training data or another part too: expected each "
                "pair in one"
            )
        positives[domain] = np.concatenate([positives[domain], keys])
        drawn, mask = _drawn(path / "candidates.parquet", listed, items[domain])
        held_out[part] = HeldOut(*(x.astype(np.int32) for x in (rows, chosen, drawn)), mask)
    for part, held in held_out.items():
        domain = HELD_OUT[part]
        keys = held.users.astype(np.int64)[:, None] * sizes[domain] + held.candidates
        if (np.isin(keys, positives[domain]) & held.mask).any():
            raise InputError(
                f"{path / 'candidates.parquet'}: a candidate for {part} is among the user's own "
                "items: write the files anew by launch/export.py --data"
            )
    ids = tuple(np.array(list(x), object) for x in (users, items["target"], items["source"]))
    made = from_split(interactions, held_out, ids, report=report, options=options, only=only)
    if "reading" in meta:
        made = made._replace(meta=made.meta | {"reading": meta["reading"]})
    file = path / "target" / _SEEN
    if not file.exists():
        return made
    seen = np.stack(_rows(file, users, items["target"]), axis=1)
    made = made._replace(seen=_csr(np.unique(seen, axis=0), len(users), len(items["target"])))
    return made._replace(meta=made.meta | {"hash": content_hash(made)})


def _csr(
    pairs: np.ndarray, num_users: int, num_items: int, weights: np.ndarray | None = None
) -> UserItems:
    """Distinct pairs, sorted by user, then item, as CSR."""
    degrees = np.bincount(pairs[:, 0], minlength=num_users)
    indptr = np.concatenate([[0], np.cumsum(degrees)]).astype(np.int32)
    return UserItems(indptr, pairs[:, 1].astype(np.int32), num_items, weights)


def _write(path: Path, weights: np.ndarray | None = None, **columns: np.ndarray) -> None:
    named = {f"{name}:token": column for name, column in columns.items()}
    if weights is not None:
        named[_WEIGHT] = weights.astype(str)
    frame = pl.DataFrame(
        {name: pl.Series(column.tolist(), dtype=pl.String) for name, column in named.items()}
    )
    frame.write_csv(path, separator="\t", quote_style="never")


def _listed(path: Path, name: str) -> dict[str, int]:
    """Places of the ids that a file lists, in its order."""
    ids: dict[str, int] = {}
    for number, (value,) in readers.read_columns(path, f"{name}:token"):
        if value in ids:
            raise InputError(f"{path}:{number}: id {value!r} stands there twice: expected it once")
        ids[value] = len(ids)
    if not ids:
        raise InputError(f"{path}: no ids: expected one a line under {name}:token")
    return ids


def _rows(path: Path, users: dict[str, int], items: dict[str, int]) -> tuple[np.ndarray, ...]:
    """Places int64[n] of users and items."""
    codes = array.array("q"), array.array("q")
    for number, pair in readers.read_columns(path, "user_id:token", "item_id:token"):
        for places, name, known in zip(codes, pair, (users, items), strict=True):
            if name not in known:
                raise InputError(
                    f"{path}:{number}: id {name!r} is not listed in the .user or .item file: "
                    "expected all ids there"
                )
            places.append(known[name])
    return tuple(np.array(places, np.int64) for places in codes)


def _weights(path: Path) -> np.ndarray | None:
    """The weights f32[n] of a file's rows, if it has them."""
    with formats.opened(str(path)) as file:
        _, header = next(lines.strictly(str(path), file))
    if _WEIGHT not in header.split("\t"):
        return None
    found = array.array("f")
    for number, (text,) in readers.read_columns(path, _WEIGHT):
        try:
            found.append(values.real_of("weight", text, values.Reading()))
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}") from None
    return np.array(found, np.float32)


def _drawn(path: Path, listed: pl.DataFrame, items: dict[str, int]) -> tuple[np.ndarray, ...]:
    """Candidates int64[users, n] and which of them count bool[users, n]."""
    names, counts = listed["candidates"].to_list(), listed["counts"].to_list()
    width = len((names or [[]])[0] or [])
    for row in (*names, *counts):
        if row is None or len(row) != width or None in row:
            raise InputError(
                f"{path}: lists of unequal length, or without a value: write the files anew by "
                "launch/export.py --data"
            )
    unknown = next((name for row in names for name in row if name not in items), None)
    if unknown is not None:
        raise InputError(
            f"{path}: id {unknown!r} is not listed in the .item file: expected all ids there"
        )
    codes = np.array([[items[name] for name in row] for row in names], np.int64)
    shape = len(names), width
    return codes.reshape(shape), np.array(counts, bool).reshape(shape)
