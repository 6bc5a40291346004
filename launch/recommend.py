"""Recommends items of the target domain to users, by the best checkpoint of a run.

python launch/recommend.py --workdir=DIR (--user=ID | --users=FILE | --all) [--k=10]
    [--source=FILE] [--items_of=FILE] [--fallback=popularity] [--items=FILE] [--include_seen]
    [--include_cold] [--explain] [--exact] [--out=FILE.csv|.jsonl|.parquet]

Ids are raw ones, as in the files that the data were prepared from. Without --out the lists are
printed. A user for whom no item is left has no list; how many such users there are is said on
stderr, and the exit status is 0 all the same. It is 2 where the request is at fault, or where
nothing can rank for a user.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from conet_jax import cli
from conet_jax.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; required.", required=True)
_DATA = flags.DEFINE_string(
    "data", None, "Folder of the run's data; by default where they were, or next to the run."
)
_USER = flags.DEFINE_multi_string(
    "user", None, "Raw id of a user; may be given more than once; by default none."
)
_USERS = flags.DEFINE_string(
    "users", None, "Text file of raw user ids, one a line; by default none."
)
_ALL = flags.DEFINE_boolean(
    "all", False, "All users of the run's data, and those of --source and --items_of."
)
_K = flags.DEFINE_integer("k", 10, "Items a user.", lower_bound=1)
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Raw file of source interactions, in any format that launch/prepare.py reads, with what users "
    "have who are not in the run's data; by default none.",
)
_ITEMS_OF = flags.DEFINE_string(
    "items_of",
    None,
    "Raw file of target interactions, likewise, of users who are not in the run's data: the model "
    "ranks for them by these items, and does not list them again; by default none.",
)
_FALLBACK = flags.DEFINE_enum(
    "fallback",
    None,
    ["popularity"],
    "What ranks for users whom nothing is known of; by default an error.",
)
_ITEMS = flags.DEFINE_string(
    "items", None, "Text file of raw item ids, one a line, to choose from; by default all."
)
_INCLUDE_SEEN = flags.DEFINE_boolean(
    "include_seen",
    False,
    "Do not leave out what a user has: in training, validation or test, or in --items_of.",
)
_INCLUDE_COLD = flags.DEFINE_boolean(
    "include_cold",
    False,
    "List items without training pairs in the target, too, where the model can score them.",
)
_EXPLAIN = flags.DEFINE_boolean(
    "explain",
    False,
    "Add how much of each score comes through the cross connections, and the source items that "
    "weigh most.",
)
_EXACT = flags.DEFINE_boolean(
    "exact",
    False,
    "Rank every item by the whole model for thousands of users, too; by default those that are the "
    "best by its linear part, as many as the lists of some users drawn need.",
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "File to write, .csv, .jsonl or .parquet, a row a recommendation; by default printed.",
)


def main() -> None:
    """Loads, finds the users, ranks, writes or prints."""
    asked = [flag.name for flag in (_USER, _USERS, _ALL) if flag.value]
    if len(asked) != 1:
        raise InputError(
            "expected one of --user=ID, --users=FILE and --all; found "
            + (" and ".join(f"--{name}" for name in asked) or "none")
        )

    from conet_jax.files import check_frames_path, write_frames
    from conet_jax.run.workdir import stored_config

    if _OUT.value:
        if _OUT.value.endswith("/"):
            raise InputError(f"--out={_OUT.value} is a folder: expected a file")
        check_frames_path(Path(_OUT.value))
    cli.choose_platform(stored_config(_WORKDIR.value)[0])
    from conet_jax.data import readers
    from conet_jax.serve import recommend

    recommender = recommend.load(_WORKDIR.value, data=_DATA.value)
    ids = _USER.value or (readers.read_ids(_USERS.value) if _USERS.value else None)
    given = {}
    for domain, flag in (("source", _SOURCE), ("target", _ITEMS_OF)):
        path = flag.value
        given[domain] = recommend.read_items_of(recommender, domain, path, ids) if path else {}
    fallback = _FALLBACK.value is not None
    if ids is None:
        own = list(recommender.rows) if fallback else recommend.users_of_data(recommender)
        unlearnt = len(recommender.rows) - len(own)
        if unlearnt:
            print(
                f"{unlearnt:,} users of the data have no pairs that this model learns from and are "
                "left out; --fallback=popularity gives them the most popular items",
                file=sys.stderr,
            )
        ids = dict.fromkeys([*own, *given["source"], *given["target"]])
    users = recommend.find_users(
        recommender,
        ids,
        **given,
        fallback=fallback,
        origin=_USERS.value or "",
    )
    both = sum(name in recommender.rows for name in given["target"])
    if both:
        print(
            f"of the users in --items_of={_ITEMS_OF.value} {both:,} are in the run's data: for "
            "them the model ranks as it was trained, and their items in the file do not count",
            file=sys.stderr,
        )
    items = None
    if _ITEMS.value:
        listed = set(readers.read_ids(_ITEMS.value))
        items = recommend.find_items(recommender, listed)
        if len(items) < len(listed):
            message = f"{len(listed) - len(items):,} of {len(listed):,} ids in {_ITEMS.value} are"
            if not len(items):
                raise InputError(f"{message} unknown: expected raw ids of items of the target")
            print(f"warning: {message} unknown and left out", file=sys.stderr)
        cold = 0 if _INCLUDE_COLD.value else int((~recommender.warm[items]).sum())
        if cold:
            print(
                f"warning: {cold:,} of {len(items):,} items in {_ITEMS.value} have no training "
                "pairs in the target and are not listed",
                file=sys.stderr,
            )
    if _EXPLAIN.value and recommender.uncrossed is None:
        print("this model has no cross connections at inference: no cross_score", file=sys.stderr)
    asked = {
        "k": _K.value,
        "items": items,
        "include_seen": _INCLUDE_SEEN.value,
        "include_cold": _INCLUDE_COLD.value,
    }
    began = time.perf_counter()
    if not _EXACT.value:
        recommender = recommend.for_many(recommender, users, **asked)
        if recommender.shortlist is not None:
            print(f"{recommender.shortlist}; --exact ranks everything", file=sys.stderr)
    with_list = []
    frames = recommend.stream(recommender, users, **asked, explain=_EXPLAIN.value)
    frames = _counted(frames, with_list)
    if _OUT.value:
        write_frames(Path(_OUT.value), frames)
    else:
        for frame in frames:
            print(recommend.text(frame), end="")
    seconds = time.perf_counter() - began
    without = len(users) - sum(with_list)
    if without:
        print(
            f"{without:,} of {len(users):,} users have nothing to recommend: no item is left for "
            "them and they are not listed",
            file=sys.stderr,
        )
    if _OUT.value:
        print(
            f"{len(users):,} users in {seconds:,.1f} s ({len(users) / seconds:,.0f} a second), "
            f"written to {_OUT.value}"
        )


def _counted(frames: Iterator[Any], with_list: list[int]) -> Iterator[Any]:
    """Passes frames on, and notes how many users have a list in each."""
    for frame in frames:
        with_list.append(int((frame["rank"] == 1).sum()))
        yield frame


if __name__ == "__main__":
    cli.run(main)
