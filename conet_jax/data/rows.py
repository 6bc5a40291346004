"""Checked rows of one domain, and how they are made of records, one at a time."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import polars as pl

from conet_jax.data import columns, layout, lines, ncf, values
from conet_jax.data.layout import Asked
from conet_jax.errors import InputError

_BATCH = 1 << 16  # rows that Python hands to Polars at a time
_KINDS = {role: pl.String if role in ("user", "item") else pl.Float64 for role in columns.ROLES}
_REASONS = {"missing_id": "without an id", "bad_rows": "that cannot be read"}


class DomainRows(NamedTuple):
    """One domain's checked input.

    Attributes:
      name: of the file.
      frame: String columns ``user`` and ``item`` and, where the file has them, finite Float64
        columns ``rating``, ``timestamp`` in seconds, and ``weight``.
      rows: its length.
      given: of NCF-style input alone, whose frame is train followed by test.
      left_out: rows that are not in the frame, by reason: ``missing_id``, ``bad_rows``.
      columns: the name of each role's column.
      unused: names of the others.
      notes: what the user should know, a sentence each.
      overlooked: of the unused columns those that look like a rating.
      label: whether the rating is yes or no.
      asked: how it was to be read.
    """

    name: str
    frame: pl.LazyFrame
    rows: int
    given: ncf.Given | None = None
    left_out: dict[str, int] = {}
    columns: dict[str, str] = {}
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    overlooked: tuple[str, ...] = ()
    label: bool = False
    asked: Asked = Asked()


def described(rows: DomainRows, found: layout.Layout, asked: Asked) -> DomainRows:
    """Adds what was found out of the columns, and times in seconds."""
    places = found.columns
    if found.kind == "text":
        places = {role: found.names[at] for role, at in places.items()}
    kept = [role for role in found.roles if role in rows.frame.collect_schema()]
    unused = tuple(name for name in found.names if name not in (places[role] for role in kept))
    return rows._replace(
        columns={role: places[role] for role in kept},
        unused=unused,
        notes=(*found.notes, *rows.notes),
        overlooked=found.overlooked,
        label=found.label,
        asked=asked,
    )


def checked(
    name: str,
    before: str,
    records: Iterator[lines.Record],
    found: layout.Layout,
    asked: Asked,
    times_needed: bool,
) -> DomainRows:
    """The rows of records, good ones alone; ``before`` stands before a number in messages."""
    counts, notes = counts_of(0, 0), []
    with_times = "timestamp" in found.roles

    def good() -> Iterator[tuple[str | float | None, ...]]:
        nonlocal with_times
        for number, record in records:
            try:
                if isinstance(record, ValueError):
                    raise record
                if values.is_missing(record[0]) or values.is_missing(record[1]):
                    counts["missing_id"] += 1
                    continue
                row: list = [values.id_of("user", record[0]), values.id_of("item", record[1])]
                for role, value in zip(found.roles[2:], record[2:], strict=True):
                    if role != "timestamp":
                        row.append(values.real_of(role, value, found.reading))
                    elif not with_times:
                        row.append(None)
                    else:
                        try:
                            row.append(values.time_of(value, found.reading))
                        except ValueError as error:
                            if times_needed:
                                raise
                            with_times = False
                            row.append(None)
                            notes.append(
                                f"its times are left out, as one cannot be read: {name}:{before}"
                                f"{number}: {error}"
                            )
            except ValueError as error:
                if not asked.skip_bad_rows:
                    raise InputError(
                        f"{name}:{before}{number}: {error}; --skip_bad_rows leaves such rows out"
                    ) from None
                counts["bad_rows"] += 1
                continue
            yield tuple(row)

    rows = good()
    kinds = {role: _KINDS[role] for role in found.roles}
    batches = iter(lambda: list(itertools.islice(rows, _BATCH)), [])
    parts = [pl.DataFrame(batch, schema=kinds, orient="row") for batch in batches]
    if not parts:
        why = ", ".join(f"{count:,} {_REASONS[reason]}" for reason, count in counts.items())
        raise InputError(f"{name}: no row is left ({why}): expected a user and an item in each row")
    frame = pl.concat(parts)
    if "timestamp" in kinds and not with_times:
        frame = frame.drop("timestamp")
    made = DomainRows(name, frame.lazy(), len(frame), left_out=counts, notes=tuple(notes))
    return in_seconds(made, frame["timestamp"].max() if with_times else None)


def counts_of(missing: int, bad: int) -> dict[str, int]:
    """Returns ``DomainRows.left_out``."""
    return {"missing_id": missing, "bad_rows": bad}


def in_seconds(rows: DomainRows, largest: float | None) -> DomainRows:
    """Times in milliseconds and the like become seconds."""
    size, name = values.unit(largest or 0.0)
    if size == 1:
        return rows
    frame = rows.frame.with_columns(pl.col("timestamp") / size)
    return rows._replace(frame=frame, notes=(*rows.notes, f"its times are taken to be in {name}"))
