"""A prepared data set on disk: ``dataset.json`` and one ``.npy`` file an array, no pickle.

It is written beside its place and renamed, so that a directory is either whole or not there.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from conet_jax import files
from conet_jax.data.assemble import count
from conet_jax.data.types import (
    DOMAINS,
    HELD_OUT,
    KINDS,
    Dataset,
    HeldOut,
    UserItems,
    arrays,
    content_hash,
)
from conet_jax.errors import InputError

_FORMAT = 1
_JSON = "dataset.json"
_IDS = ("user_ids", "target_item_ids", "source_item_ids")
_DTYPES = {
    **{f"{rows}_{field}": "<i4" for rows in (*DOMAINS, "seen") for field in ("indptr", "indices")},
    **{f"{domain}_weights": "<f4" for domain in DOMAINS},
    **{
        f"{part}_{field}": "|b1" if field == "mask" else "<i4"
        for part in HELD_OUT
        for field in HeldOut._fields
    },
    **{f"{name}_bytes": "|u1" for name in _IDS},
    **{f"{name}_offsets": "<i8" for name in _IDS},
}
_FILES = {_JSON, *(f"{name}.npy" for name in _DTYPES)}


def check_writable(directory: str | os.PathLike) -> Path:
    """Returns the path that ``save`` would write, or says why it would refuse.

    Raises:
      InputError: something other than an empty or a prepared directory is in the way.
    """
    path = Path(os.path.realpath(directory))
    if path.exists() and not path.is_dir():
        raise InputError(f"{directory}: exists and is not a directory; name another")
    try:
        found = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be written: {error.strerror}; see to it, or name another"
        ) from error
    if found and not (found <= _FILES and found & (_FILES - {_JSON})):
        other = min(found - _FILES, default=_JSON)
        raise InputError(
            f"{directory}: is not a prepared data set (it holds {other}), so it is not replaced; "
            "name another folder"
        )
    return path


def check_new(directory: str | os.PathLike) -> Path:
    """Returns the path that ``new_folder`` would write.

    Raises:
      InputError: something is there already.
    """
    path = Path(os.path.realpath(directory))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{directory}: is not empty; expected a new or empty folder")
    return path


@contextlib.contextmanager
def new_folder(directory: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill, beside ``directory``, whose place it takes once all is well.

    Raises:
      InputError: something is there already, or it cannot be written.
    """
    path = check_new(directory)
    beside = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        yield beside
        if path.exists():
            path.rmdir()
        beside.rename(path)
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be written: {error.strerror}; see to it, or name another"
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def save(dataset: Dataset, directory: str | os.PathLike) -> None:
    """Writes a data set; the same data set gives the same bytes.

    Args:
      dataset: what to write.
      directory: a new or empty directory, or a prepared one, which is replaced as a whole.

    Raises:
      InputError: the directory is something else, or cannot be written.
    """
    path = check_writable(directory)
    new, old = (path.with_name(f".{path.name}.{what}-{os.getpid()}") for what in ("new", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        for name, values in arrays(dataset).items():
            with open(new / f"{name}.npy", "wb") as file:
                little = np.ascontiguousarray(values, _DTYPES[name])
                np.lib.format.write_array(file, little, version=(1, 0), allow_pickle=False)
        text = json.dumps({"format": _FORMAT, **dataset.meta}, indent=2, sort_keys=True)
        (new / _JSON).write_text(text + "\n", encoding="utf-8")
        if path.exists():
            path.rename(old)
        new.rename(path)
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be written: {error.strerror}; see to it, or name another"
        ) from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def load(directory: str | os.PathLike) -> Dataset:
    """Reads a data set and checks all of it: shapes, ranges, order and hash.

    Args:
      directory: what ``save`` wrote.

    Raises:
      InputError: it is missing, truncated, altered or of another format; the message says where.

    Example:
      >>> import tempfile
      >>> from conet_jax.data.synthetic import dataset
      >>> made, _ = dataset(seed=0, num_users=20, num_target_items=20, num_source_items=20,
      ...                   target_interactions=80, source_interactions=80, candidates=5)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(made, folder)
      ...     print(load(folder).meta["hash"] == made.meta["hash"])
      True
    """
    path = Path(directory)
    if not (path / _JSON).is_file():
        raise InputError(f"{directory}: no prepared data here ({_JSON} is missing); run prepare")
    try:
        meta = files.read_json(path / _JSON)
        found = meta.pop("format")
        counts, stored = meta["counts"], meta["hash"]
        sizes = {name: counts[name] for name in ("users", "target_items", "source_items")}
        if not all(type(n) is int and n > 0 for n in sizes.values()):
            raise TypeError
        if not (type(meta["options"]) is type(meta["audit"]) is dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        _damaged(path / _JSON, "not readable as the description of a data set")
    if found != _FORMAT:
        _damaged(path / _JSON, f"format {found!r} where {_FORMAT} is expected")
    # A part that is not there at all is one that the data set does not have: the hash knows.
    parts = {
        part: [f"{part}_{field}" for field in HeldOut._fields]
        for part in HELD_OUT
        if part in ("valid", "test") or (path / f"{part}_users.npy").exists()
    }
    others = [
        name
        for name in _DTYPES
        if name.partition("_")[0] in (*DOMAINS, "user")
        and (not name.endswith("_weights") or (path / f"{name}.npy").exists())
    ]
    read = {
        name: _read(path / f"{name}.npy", _DTYPES[name])
        for name in (*others, *(name for names in parts.values() for name in names))
    }
    interactions = {}
    for domain in DOMAINS:
        indptr, indices = read[f"{domain}_indptr"], read[f"{domain}_indices"]
        num_items = sizes[f"{domain}_items"]
        problem = _csr_problem(indptr, indices, sizes["users"], num_items)
        weights = read.get(f"{domain}_weights")
        if problem is None and weights is not None:
            problem = _weights_problem(weights, len(indices))
        if problem:
            _damaged(path, f"{domain}: {problem}")
        interactions[domain] = UserItems(indptr, indices, num_items, weights)
    held = {}
    for part, names in parts.items():
        held[part] = HeldOut(*(read[name] for name in names))
        num_items = sizes[f"{HELD_OUT[part]}_items"]
        problem = _held_out_problem(held[part], sizes["users"], num_items)
        if problem:
            _damaged(path, f"{part}: {problem}")
    ids = {}
    for name, size in zip(_IDS, sizes.values(), strict=True):
        try:
            ids[name] = _decode(read[f"{name}_bytes"], read[f"{name}_offsets"], size)
        except ValueError as error:
            _damaged(path, f"{name}: {error}")
    for name, number in count(interactions, held).items():
        if counts.get(name) != number:
            _damaged(path / _JSON, f"counts.{name} differs from the arrays")
    problem = _kinds_problem(counts, interactions, held)
    if problem:
        _damaged(path / _JSON, problem)
    seen = None
    if (path / "seen_indptr.npy").exists():
        arrays_of = (_read(path / f"seen_{field}.npy", "<i4") for field in ("indptr", "indices"))
        seen = UserItems(*arrays_of, sizes["target_items"])
        problem = _csr_problem(seen.indptr, seen.indices, sizes["users"], seen.num_items)
        if problem:
            _damaged(path, f"seen: {problem}")
    dataset = Dataset(**interactions, **held, **ids, meta=meta, seen=seen)
    if content_hash(dataset) != stored:
        _damaged(path, "the content does not match its hash")
    return dataset


def _damaged(where: Path, what: str) -> NoReturn:
    raise InputError(f"{where}: {what}; the prepared data is damaged or altered: run prepare again")


def _read(path: Path, dtype: str) -> np.ndarray:
    try:
        values = files.read_array(path)
    except FileNotFoundError:
        _damaged(path, "the file is missing")
    except (OSError, ValueError) as error:
        _damaged(path, f"cannot be read ({error})")
    if values.dtype != np.dtype(dtype):
        _damaged(path, f"not an array of type {dtype}")
    return values


def _csr_problem(
    indptr: np.ndarray, indices: np.ndarray, num_users: int, num_items: int
) -> str | None:
    if indptr.shape != (num_users + 1,) or indices.ndim != 1:
        return f"arrays of the wrong shape {indptr.shape}, {indices.shape} for {num_users} users"
    if indptr[0] != 0 or indptr[-1] != len(indices) or (np.diff(indptr) < 0).any():
        return "row pointers that do not increase from 0 to the number of interactions"
    if len(indices) and not 0 <= indices.min() <= indices.max() < num_items:
        return f"an item index out of range 0 .. {num_items - 1}"
    rising = np.diff(indices) > 0
    starts = indptr[1:-1]
    rising[starts[(starts > 0) & (starts < len(indices))] - 1] = True  # between two users
    return None if rising.all() else "items of a user that are not strictly increasing"


def _weights_problem(weights: np.ndarray, count: int) -> str | None:
    if weights.shape != (count,):
        return f"weights of the wrong shape {weights.shape} for {count} interactions"
    good = np.isfinite(weights) & (weights > 0)
    return None if good.all() else "weights that are not above 0"


def _held_out_problem(held: HeldOut, num_users: int, num_items: int) -> str | None:
    n = len(held.users) if held.users.ndim == 1 else -1
    if held.items.shape != (n,) or held.candidates.shape[:1] != (n,) or held.candidates.ndim != 2:
        return "arrays whose shapes do not agree"
    if held.mask.shape != held.candidates.shape:
        return "a mask of another shape than the candidates"
    for what, values, size in (
        ("user", held.users, num_users),
        ("item", held.items, num_items),
        ("candidate", held.candidates, num_items),
    ):
        if values.size and not 0 <= values.min() <= values.max() < size:
            return f"a {what} index out of range 0 .. {size - 1}"
    pairs = held.users.astype(np.int64) * num_items + held.items
    return None if (np.diff(pairs) > 0).all() else "pairs that are not strictly increasing"


def _kinds_problem(
    counts: dict, interactions: dict[str, UserItems], held: dict[str, HeldOut]
) -> str | None:
    """What is wrong with the counts of users of both domains and of one alone, if there are any."""
    kinds = [counts.get(kind, 0) for kind in KINDS]
    if not any(kind in counts for kind in KINDS):
        kinds[0] = counts["users"]
    if not all(type(n) is int and n >= 0 for n in kinds) or sum(kinds) != counts["users"]:
        return f"counts of {', '.join(KINDS)} that do not add up to the users"
    shared, with_target = kinds[0], kinds[0] + kinds[1]
    degrees = {domain: np.diff(rows.indptr) for domain, rows in interactions.items()}
    if degrees["target"][with_target:].any() or degrees["source"][shared:with_target].any():
        return "interactions of users in a domain that they are not counted in"
    for part, (low, high) in {
        **dict.fromkeys(held, (0, shared)),
        "test_target_only": (shared, with_target),
    }.items():
        users = held[part].users if part in held else ()
        if len(users) and not low <= users[0] <= users[-1] < high:
            return f"{part}: users of another kind than expected"
    return None


def _decode(data: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
    if data.ndim != 1 or offsets.shape != (size + 1,):
        raise ValueError(f"ids for {size} rows expected")
    if offsets[0] != 0 or offsets[-1] != len(data) or (np.diff(offsets) < 0).any():
        raise ValueError("offsets that do not increase from 0 to the number of bytes")
    text = data.tobytes()
    ids = np.empty(size, dtype=object)
    bounds = offsets.tolist()
    for at in range(size):
        ids[at] = text[bounds[at] : bounds[at + 1]].decode("utf-8", "surrogatepass")
    return ids
