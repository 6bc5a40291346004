"""Recommends items of the target domain to users, by the best checkpoint of a run.

python launch/recommend.py --workdir=DIR (--user=ID | --users=FILE | --all) [--k=10]
    [--source=FILE] [--fallback=popularity] [--items=FILE] [--include_seen] [--explain]
    [--out=FILE.csv|.jsonl|.parquet]

Ids are raw ones, as in the files that the data were prepared from. Without --out the lists are
printed.
"""

import sys
import time
from pathlib import Path

from absl import flags

from conet_jax import cli
from conet_jax.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; required.", required=True)
_USER = flags.DEFINE_multi_string(
    "user", None, "Raw id of a user; may be given more than once; by default none."
)
_USERS = flags.DEFINE_string(
    "users", None, "Text file of raw user ids, one a line; by default none."
)
_ALL = flags.DEFINE_boolean("all", False, "All users of the run's data, and those of --source.")
_K = flags.DEFINE_integer("k", 10, "Items a user.", lower_bound=1)
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Raw file of source interactions, in any format that launch/prepare.py reads, with what users "
    "have who are not in the run's data; by default none.",
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
    "include_seen", False, "Do not leave out what a user has in training, validation or test."
)
_EXPLAIN = flags.DEFINE_boolean(
    "explain",
    False,
    "Add how much of each score comes through the cross connections, and the source items that "
    "weigh most.",
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

    recommender = recommend.load(_WORKDIR.value)
    ids = _USER.value or (readers.read_ids(_USERS.value) if _USERS.value else None)
    source = recommend.read_source(recommender, _SOURCE.value, ids) if _SOURCE.value else {}
    if ids is None:
        ids = dict.fromkeys([*recommender.rows, *source])
    users = recommend.find_users(
        recommender,
        ids,
        source=source,
        fallback=_FALLBACK.value is not None,
        origin=_USERS.value or "",
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
    if _EXPLAIN.value and recommender.off is None:
        print("this model has no cross connections at inference: no cross_score", file=sys.stderr)
    frames = recommend.stream(
        recommender,
        users,
        k=_K.value,
        items=items,
        include_seen=_INCLUDE_SEEN.value,
        explain=_EXPLAIN.value,
    )
    if not _OUT.value:
        for frame in frames:
            print(recommend.text(frame), end="")
        return
    began = time.perf_counter()
    write_frames(Path(_OUT.value), frames)
    seconds = time.perf_counter() - began
    print(
        f"{len(users):,} users in {seconds:,.1f} s ({len(users) / seconds:,.0f} a second), "
        f"written to {_OUT.value}"
    )


if __name__ == "__main__":
    cli.run(main)
