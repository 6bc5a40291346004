"""From files or tables to a data set: what launch/prepare.py does, for Python."""

import difflib
import inspect
import math
import os
from collections.abc import Mapping
from typing import Any

import polars as pl

from conet_jax.data import build, columns, readers, store
from conet_jax.data.layout import Asked
from conet_jax.data.types import DOMAINS, Dataset
from conet_jax.errors import InputError

_BUILD = [
    name
    for name, parameter in inspect.signature(build.build).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
]
_READING = list(Asked._fields)
# Columns of these roles are named so where they are printed.
_ROLES = {"timestamp": "time"}


def prepare(
    target: Any, source: Any, *, out: str | os.PathLike | None = None, **options: Any
) -> Dataset:
    """Builds one data set from the files or tables of two domains.

    Args:
      target: the domain to recommend in: a path, a Polars or pandas frame, a dictionary of columns,
        or rows of user, item, rating, timestamp; see ``readers.read``.
      source: the domain to learn from.
      out: a folder to write the data set to, as ``store.save`` does; None writes nothing.
      **options: those of launch/prepare.py: of ``layout.Asked`` (``rating_column``, …; with
        ``target_`` or ``source_`` in front for one domain alone), and of ``build.build``
        (``min_rating``, ``split``, ``candidates``, …).

    Returns:
      The data set; ``meta["reading"]`` says by domain which column was read as what.

    Raises:
      InputError: an option is unknown, or as in ``readers.read`` and ``build.build``.

    Example:
      >>> users = [f"u{n % 6}" for n in range(24)]
      >>> films = {"user": users, "film": [f"f{n % 8}" for n in range(24)], "stars": [5] * 24}
      >>> books = {"user": users, "book": [f"b{n % 9}" for n in range(24)]}
      >>> data = prepare(films, books, candidates=2)
      >>> data.num_users, data.meta["reading"]["target"]["columns"]
      (6, {'user': 'user', 'item': 'film', 'rating': 'stars'})
    """
    own = {f"{domain}_{field}" for domain in DOMAINS for field in _READING}
    known = {*own, *_READING, *_BUILD}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            raise InputError(
                f"unknown option {name!r}"
                + (
                    f"; did you mean {near[0]}?"
                    if near
                    else ": expected those of launch/prepare.py"
                )
            )
    tables = {"target": target, "source": source}
    if all(isinstance(table, str) and table == "-" for table in tables.values()):
        raise InputError("both files are -: expected one of them from standard input")
    building = {name: value for name, value in options.items() if name in _BUILD}
    times_needed = building.get("split") in ("latest", "time")
    rows = {}
    for domain, table in tables.items():
        asked = {
            field: options[name]
            for field in _READING
            for name in (field, f"{domain}_{field}")
            if options.get(name) is not None
        }
        found = readers.read(table, times_needed=times_needed, **asked)
        is_path = isinstance(table, str | os.PathLike)
        rows[domain] = found if is_path else found._replace(name=f"the {domain}'s table")
    made = build.build(rows["target"], rows["source"], **building)
    reading = {domain: _reading(found) for domain, found in rows.items()}
    made = made._replace(meta=made.meta | {"reading": reading})
    if out is not None:
        store.save(made, out)
    return made


def positives_of(meta: Mapping, domain: str, path: str) -> pl.LazyFrame:
    """Reads another file of a domain as the one that a data set was prepared from.

    Args:
      meta: of the data set.
      domain: "target" or "source".
      path: the file.

    Returns:
      user and item of the pairs whose latest rating is at or above the domain's threshold.

    Raises:
      InputError: as ``readers.read``, or it has no rating where that one had.
    """
    options = meta["options"]
    try:
        then = meta.get("reading", {}).get(domain, {})
        asked, column = dict(then.get("asked", {})), then.get("columns", {}).get("rating")
        if any(type(value) is not type(Asked._field_defaults[key]) for key, value in asked.items()):
            raise TypeError
        # Only what was a pair's weight is not read here, and it is nothing else either.
        if asked.pop("weight_column", columns.NONE) != columns.NONE and column is None:
            asked["rating_column"] = columns.NONE
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            "dataset.json does not say how the data's files were read, though it has a place for "
            "it: it was altered; prepare again"
        ) from None
    rows = readers.read(path, times_needed=False, **asked)
    if "rating" not in rows.columns or rows.given is not None:
        if column is not None and rows.given is None:
            raise InputError(
                f"{path}: no rating is read, and {column!r} was in the {domain} that the data were "
                "prepared from: expected such a column, or prepare again with "
                f"--{domain}_rating_column=none"
            )
        return rows.frame.select("user", "item")
    least = options.get(f"{domain}_min_rating", options.get("min_rating", -math.inf))
    frame = rows.frame.with_columns(low=pl.col("rating") < least)
    if "timestamp" in rows.columns:
        frame = frame.sort("timestamp", maintain_order=True)
    latest = frame.unique(["user", "item"], keep="last", maintain_order=True)
    return latest.filter(~pl.col("low")).select("user", "item")


def columns_read(meta: Mapping, names: Mapping[str, str]) -> list[str]:
    """Says which column of each domain was read as what, a line a domain and note.

    Args:
      meta: of a data set.
      names: of the files, by domain.
    """
    lines = []
    for domain, found in meta.get("reading", {}).items():
        parts = [f"{_ROLES.get(role, role)} {name!r}" for role, name in found["columns"].items()]
        absent = [word for word in ("rating", "timestamp") if word not in found["columns"]]
        parts += [f"no {_ROLES.get(role, role)}" for role in absent]
        left = ", ".join(map(repr, found["unused"])) or "nothing"
        lines.append(f"{domain} {names[domain]}: {', '.join(parts)}; left out: {left}")
        lines += [f"  note: {note}" for note in found["notes"]]
    return lines


def overlooked(meta: Mapping) -> list[str]:
    """Warns of columns that were not read and look like a rating, or like yes and no."""
    lines = []
    for domain, found in meta.get("reading", {}).items():
        if not found["overlooked"]:
            continue
        listed = ", ".join(map(repr, found["overlooked"]))
        flag = f"--{domain}_rating_column={found['overlooked'][0]}"
        if "rating" in found["columns"]:
            lines.append(
                f"{domain}: {listed} may be feedback too, and is not read ({flag} reads it)"
            )
        else:
            lines.append(
                f"{domain}: every row counts as a positive, though {listed} may be feedback: "
                f"{flag} reads it, --{domain}_rating_column=none is content without"
            )
    return lines


def _reading(rows: readers.DomainRows) -> dict:
    """What is kept of the reading, in JSON's types."""
    asked = {
        field: value
        for field, value in rows.asked._asdict().items()
        if value != Asked._field_defaults[field]
    }
    return {
        "asked": asked,
        "columns": rows.columns,
        "unused": list(rows.unused),
        "notes": list(rows.notes),
        "overlooked": list(rows.overlooked),
    }
