"""Builds one data set from the raw files of two domains.

  python launch/prepare.py --target=books.csv --source=movies.csv --out=DIR
  python launch/prepare.py --target=books.csv --source=movies.csv.zip --out=DIR \
      --target_rating_column=Book-Rating --target_min_rating=7
  python launch/prepare.py --download=amazon --out=DIR
  python launch/prepare.py --recbole=DIR --out=DIR

Prints which columns were read as what, the data set's statistics as in Table 1 of the paper, and an
audit of what was dropped and what to beware of. docs/data.md says which files are read, and how.
"""

import functools
import math
import sys
from pathlib import Path

from absl import flags

from conet_jax import cli, console
from conet_jax.errors import InputError

# The same names as conet_jax.data.formats.FORMATS, written out so that --help loads no Polars.
_FORMATS = (
    "auto",
    "amazon_2014",
    "amazon_2018",
    "amazon_json",
    "named",
    "tsv",
    "recbole",
    "json",
    "parquet",
    "ncf",
)
_TARGET = flags.DEFINE_string(
    "target",
    None,
    "File of the domain to recommend in, - for standard input (NCF-style data: folder or prefix); "
    "required without --download.",
)
_SOURCE = flags.DEFINE_string(
    "source", None, "The same for the domain to learn from; required without --download."
)
_OUT = flags.DEFINE_string("out", None, "Directory to write, a prepared one is replaced; required.")


# Columns, by the flags that name them.
_COLUMNS = {
    "user_column": "user",
    "item_column": "item",
    "rating_column": "rating",
    "time_column": "time",
    "weight_column": "weight",
}


def _define_reading(prefix: str, of: str, default: str) -> None:
    """Defines how files are read, of both domains or, with a prefix, of one."""
    by_default = "; by default that of --format" if prefix else ""
    default_format = None if prefix else "auto"
    help_format = f"Format of {of}{by_default}."
    flags.DEFINE_enum(f"{prefix}format", default_format, _FORMATS, help_format)
    for name, role in _COLUMNS.items():
        none = "" if role in ("user", "item") else "; none reads none"
        flags.DEFINE_string(
            f"{prefix}{name}",
            None,
            f"Column of the {role} in {of}: its name, or its number from 1 without a header{none}; "
            f"by default {default or ('none' if role == 'weight' else 'found by its name')}.",
        )
    flags.DEFINE_string(
        f"{prefix}separator",
        None,
        f"Text between the fields of {of}, or tab, comma, semicolon, pipe, space; by default "
        f"{default or 'found out'}.",
    )
    flags.DEFINE_enum(
        f"{prefix}header",
        None,
        ["auto", "yes", "no"],
        f"Whether the first line of {of} has the names of the columns; by default "
        f"{default or 'found out'}.",
    )
    flags.DEFINE_float(
        f"{prefix}min_rating",
        None,
        f"Least rating that counts as positive, in the unit of {of}; by default "
        f"{default or '4, or 1 for feedback of yes or no'}.",
    )


_define_reading("", "both files", "")
_define_reading("target_", "the target", "as for both")
_define_reading("source_", "the source", "as for both")
_SKIP_BAD_ROWS = flags.DEFINE_boolean(
    "skip_bad_rows", False, "Leave rows out that cannot be read, and count them."
)
_DOWNLOAD = flags.DEFINE_enum(
    "download",
    None,
    ["amazon"],
    "Fetch the two files instead (kept in OUT.raw; a broken download is resumed); by default "
    "nothing.",
)
_RECBOLE = flags.DEFINE_string(
    "recbole",
    None,
    "Folder of RecBole's atomic files written by launch/export.py --data, whose split is kept; by "
    "default none.",
)
_MIN_USER_ITEMS = flags.DEFINE_integer(
    "min_user_items", None, "Least items a user has in each domain (default 1; 5 with --download)."
)
_MIN_ITEM_USERS = flags.DEFINE_integer(
    "min_item_users", None, "Least users an item has (default 1; 5 with --download)."
)
_MAX_USER_ITEMS = flags.DEFINE_integer(
    "max_user_items",
    None,
    "Most items, liked or not, that a user has in a domain; users with more are left out, as "
    "robots are; by default all stay but those who like every item.",
)
_SEEN_ARE_NO_CANDIDATES = flags.DEFINE_boolean(
    "seen_are_no_candidates",
    False,
    "Draw no negatives to rank against from what a user rated below the threshold.",
)
_SPLIT = flags.DEFINE_enum(
    "split",
    "random",
    ["random", "latest", "time", "ratio"],
    "Which item of a user is the test item: any, the one with the latest time, the first from "
    "--cutoff on; or, with ratio, several by --ratios.",
)
_RATIOS = flags.DEFINE_list(
    "ratios", None, "With --split=ratio: training, validation, test items; by default 8,1,1."
)
_KEEP_FUTURE = flags.DEFINE_boolean(
    "keep_future",
    False,
    "With --split=latest: keep a user's source rows from the time of the held-out item on.",
)
_CUTOFF = flags.DEFINE_string(
    "cutoff",
    None,
    "Required with --split=time: the moment from which on rows are held out or dropped; a date as "
    "2014-07-01, a share of the target's rows as 0.8, or a time as in the files; no default.",
)
_HOLD_OUT = flags.DEFINE_enum(
    "hold_out", "target", ["target", "both"], "Domains whose items are held out."
)
_USERS = flags.DEFINE_enum(
    "users",
    "shared",
    ["shared", "all"],
    "Users to keep: those of both domains, as in the paper, or those of one alone, too.",
)
_CANDIDATES = flags.DEFINE_integer("candidates", 99, "Negatives each held-out item is ranked with.")
_EVAL_K = flags.DEFINE_integer(
    "eval_k",
    10,
    "Largest K of HR@K and NDCG@K that runs will report; needs more candidates than that.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all draws, from 0.")
_DROP_TWINS = flags.DEFINE_boolean(
    "drop_twins", False, "Remove the source item of each pair of twins (see the audit)."
)
_TWIN_JACCARD = flags.DEFINE_float(
    "twin_jaccard",
    0.5,
    "Jaccard index of their users, above 0 and at most 1, from which two items are twins.",
)
_TWIN_USERS = flags.DEFINE_integer("twin_users", 2, "Users that two twins share at least, from 1.")

# Table 1 of the paper: users, then items and interactions of target and source.
_PAPER_AMAZON = (80_763, 93_799, 1_323_101, 35_896, 963_373)


def main() -> None:
    """Reads, builds, writes, prints."""
    core = _check_flags()

    from conet_jax.data import audit, prepare, recbole, store

    store.check_writable(_OUT.value)
    files = {}
    if _RECBOLE.value:
        built = recbole.load(_RECBOLE.value)
    else:
        files = dict(zip(("target", "source"), _inputs(), strict=True))
        built = prepare.prepare(
            **files,
            **_reading(),
            skip_bad_rows=_SKIP_BAD_ROWS.value,
            min_user_items=_MIN_USER_ITEMS.value or core,
            min_item_users=_MIN_ITEM_USERS.value or core,
            max_user_items=_MAX_USER_ITEMS.value,
            seen_are_candidates=not _SEEN_ARE_NO_CANDIDATES.value,
            split=_SPLIT.value if _SPLIT.present else None,
            candidates=_CANDIDATES.value,
            seed=_SEED.value,
            drop_twins=_DROP_TWINS.value,
            twin_jaccard=_TWIN_JACCARD.value,
            twin_users=_TWIN_USERS.value,
            keep_future=_KEEP_FUTURE.value,
            cutoff=_CUTOFF.value,
            hold_out=_HOLD_OUT.value,
            users=_USERS.value,
            ratios=_RATIOS.value,
        )
    listed = built.test.candidates.shape[1]  # given with the files, perhaps
    if listed <= _EVAL_K.value:
        raise InputError(
            f"the test items are ranked with {listed} candidates: expected more than "
            f"--eval_k={_EVAL_K.value}; ask for a smaller K"
        )
    if files:  # RecBole's bring the command that made them first
        built.meta["prepared_by"] = console.command("prepare", without="out")
    store.save(built, _OUT.value)
    if files:
        print("\n".join([*prepare.columns_read(built.meta, files), ""]))
    print("\n".join(_table(built.meta["counts"], paper=_DOWNLOAD.value == "amazon")))
    if "twins" in built.meta["audit"]:  # data made from arrays have had no audit
        print("\n".join(_audit(built.meta)))
    print("\n".join(audit.lines(built.meta["audit"])))
    print(f"\nwritten to {_OUT.value} (hash {built.meta['hash'][:12]})")
    for line in [*prepare.overlooked(built.meta), *audit.warnings(built.meta["audit"])]:
        print(f"warning: {line}", file=sys.stderr)


def _reading() -> dict:
    """The flags of ``_define_reading`` that are typed, by name."""
    names = [*_COLUMNS, "format", "separator", "header", "min_rating"]
    typed = [f"{prefix}{name}" for prefix in ("", "target_", "source_") for name in names]
    return {name: flags.FLAGS[name].value for name in typed if flags.FLAGS[name].present}


def _check_flags() -> int | None:
    """Checks all flag values; returns the core that holds where none is asked for."""
    if not _OUT.value:
        raise InputError(
            "--out=DIR is needed: python launch/prepare.py --target=FILE --source=FILE --out=DIR"
        )
    if _RECBOLE.value:
        others = [f for f in flags.FLAGS.get_key_flags_for_module(sys.argv[0]) if f.present]
        more = sorted({f.name for f in others} - {"recbole", "out", "eval_k"})
        if more:
            raise InputError(f"--recbole brings its own split: leave out --{more[0]}")
    elif _DOWNLOAD.value:
        if _TARGET.value or _SOURCE.value:
            raise InputError("--download brings its own files: leave out --target and --source")
    elif not (_TARGET.value and _SOURCE.value):
        raise InputError(
            "--target=FILE and --source=FILE are needed, or --download=amazon or --recbole=DIR"
        )
    for name, value in _reading().items():
        if name.endswith("min_rating") and not math.isfinite(value):
            raise InputError(f"--{name}={value} must be a finite number")
    if not 0 < _TWIN_JACCARD.value <= 1:
        raise InputError(f"--twin_jaccard={_TWIN_JACCARD.value} must be above 0 and at most 1")
    if not 0 <= _SEED.value < 2**63:
        raise InputError(f"--seed={_SEED.value} must be 0 or more and below 2^63")
    for flag in (
        *(_MIN_USER_ITEMS, _MIN_ITEM_USERS, _MAX_USER_ITEMS),
        *(_CANDIDATES, _EVAL_K, _TWIN_USERS),
    ):
        if flag.value is not None and flag.value < 1:
            raise InputError(f"--{flag.name}={flag.value} must be 1 or more")
    if _CANDIDATES.value <= _EVAL_K.value:
        raise InputError(
            f"--candidates={_CANDIDATES.value} must be above --eval_k={_EVAL_K.value}: among so "
            "few almost every item is in the first K; draw more candidates, or ask for a smaller K"
        )
    return 5 if _DOWNLOAD.value else None


def _inputs() -> tuple[str, str]:
    if not _DOWNLOAD.value:
        return _TARGET.value, _SOURCE.value
    from conet_jax.data import download

    folder = Path(_OUT.value.rstrip("/") + ".raw")
    say = functools.partial(print, file=sys.stderr)
    paths = []
    for url in download.URLS[_DOWNLOAD.value].values():
        paths.append(str(folder / url.rsplit("/", 1)[1]))
        say(f"fetching {url} -> {paths[-1]}")
        download.fetch(url, paths[-1], say=say)
    return paths[0], paths[1]


def _table(counts: dict, *, paper: bool) -> list[str]:
    rows = [("", "#user", *("#item", "#interact", "density") * 2)]
    found = [counts["users"]]
    for domain in ("target", "source"):
        found += [counts[f"{domain}_items"], counts[f"{domain}_interactions"]]
    rows.append(("this data set", *_with_densities(found)))
    if paper:
        rows.append(("paper, Table 1", *_with_densities(_PAPER_AMAZON)))
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    left = sum(widths[:2]) + 4
    half = sum(widths[2:5]) + 6
    title = " " * left + "target domain".ljust(half) + "source domain"
    if paper:
        lines.append("The paper does not state its filter: the two rows need not agree.")
    return [title, *lines]


def _with_densities(numbers: tuple[int, ...] | list[int]) -> list[str]:
    users, *rest = numbers
    cells = [f"{users:,}"]
    for items, pairs in (rest[:2], rest[2:]):
        cells += [f"{items:,}", f"{pairs:,}", f"{100 * pairs / (users * items):.3f}%"]
    return cells


def _audit(meta: dict) -> list[str]:
    audit, counts, options = meta["audit"], meta["counts"], meta["options"]
    least = (
        options.get(f"{d}_min_rating", options.get("min_rating")) for d in ("target", "source")
    )
    least = " or ".join(dict.fromkeys(f"{rating:g}" for rating in least if rating is not None))
    labels = {
        "rows": "rows read",
        "bad_rows": "left out: cannot be read",
        "missing_id": "left out: without an id",
        "too_many_items": f"left out: user with more than {options.get('max_user_items')} items",
        "has_every_item": "left out: user who likes every item",
        "rated_again": "rated again later",
        "duplicates_merged": "duplicates merged",
        "below_min_rating": f"dropped: rating below {least}",
        "user_not_shared": "dropped: user not in the other domain",
        "item_core": f"dropped: item with fewer than {options.get('min_item_users')} users",
        "user_core": f"dropped: user with fewer than {options.get('min_user_items')} items",
        "later_unknown": "dropped: after the cutoff, unknown before",
        "left_out_by_time": "left out: too late to train on",
        "positives_among_negatives": "positives among the given negatives",
    }
    lines = ["", "audit" + " " * 40 + f"{'target':>14}{'source':>14}"]
    for key, label in labels.items():
        values = [audit[domain].get(key) for domain in ("target", "source")]
        if values != [None, None]:
            cells = ("-" if value is None else f"{value:,}" for value in values)
            lines.append(f"  {label:<43}" + "".join(f"{cell:>14}" for cell in cells))
        if key == "left_out_by_time":
            kept = (f"{counts[f'{domain}_interactions']:>14,}" for domain in ("target", "source"))
            lines.append(f"  {'kept':<43}" + "".join(kept))
    if audit.get("seen"):
        lines.append(
            f"  {audit['seen']:,} pairs below the threshold are kept as seen: never recommended"
        )
    test, valid = (counts.get(f"{p}_pairs", counts[f"{p}_users"]) for p in ("test", "valid"))
    lines += [
        f"  {test:,} test items, {audit['users_without_test']:,} users without; "
        f"{valid:,} validation items, {audit['users_without_valid']:,} without",
    ]
    return lines


if __name__ == "__main__":
    cli.run(main)
