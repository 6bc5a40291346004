"""Does my second domain help my first, and whom? Prepares, searches, trains, compares, reports.

python launch/transfer.py --target=FILE --source=FILE --workdir=DIR [--budget=30m]
python launch/transfer.py --data=DIR --workdir=DIR [--budget=2h] [--names]

Writes report.html (one file, to be read in a browser or printed) and report.json into the workdir,
and prints the verdict. Interrupted, the same command goes on where it was; with a larger budget it
adds seeds. Files are read as launch/prepare.py reads them; data with needs of their own are
prepared with it, and given by --data.
"""

import re
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from conet_jax import cli
from conet_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    "configs/default.py",
    "Config file, without a variant. "
    "Its fields are set by --config.FIELD=VALUE; conet_jax/config.py has them all, with defaults.",
)
_TARGET = flags.DEFINE_string(
    "target", None, "File of the domain to recommend in; required without --data."
)
_SOURCE = flags.DEFINE_string(
    "source", None, "File of the domain that may help; required without --data."
)
_DATA = flags.DEFINE_string(
    "data", None, "Prepared data, in place of --target and --source; by default none."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of all that is written; required.", required=True
)
_BUDGET = flags.DEFINE_string(
    "budget", "30m", "Time of all calls together: 90s, 30m or 2h; one round is done in any case."
)
_NAMES = flags.DEFINE_boolean("names", False, "Show users by their ids, not by numbers.")
_USERS = flags.DEFINE_enum(
    "users", "shared", ["shared", "all"], "Users to keep when the files are prepared."
)
_MIN_ITEM_USERS = flags.DEFINE_integer(
    "min_item_users", 3, "Least users an item has.", lower_bound=1
)
_MIN_USER_ITEMS = flags.DEFINE_integer(
    "min_user_items", 2, "Least items a user has in each domain.", lower_bound=1
)
_DROP_TWINS = flags.DEFINE_boolean(
    "drop_twins", True, "Remove source items that look like a target item under another id."
)
_UNITS = {"s": 1, "m": 60, "h": 3600}


def main() -> None:
    """Answers the question."""
    file = cli.config_file(_CONFIG)
    cli.choose_platform(file.config)
    if file.variant:
        raise InputError(f"--config names the variant {file.variant!r}: expected none")
    budget = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", _BUDGET.value)
    if budget is None:
        raise InputError(f"--budget={_BUDGET.value}: expected a time such as 90s, 30m or 2h")
    given = bool(_TARGET.value), bool(_SOURCE.value)
    if any(given) == bool(_DATA.value) or (any(given) and not all(given)):
        raise InputError("expected --target=FILE with --source=FILE, or --data=DIR alone")
    from conet_jax.serve.showcase import showcase
    from conet_jax.studies import drawing, findings, page, transfer

    drawing.load_matplotlib()
    workdir = Path(_WORKDIR.value)
    names = {"target": "the target", "source": "the source"}
    if _DATA.value:
        data = _DATA.value
    else:
        data = str(workdir / "data")
        names = {"target": Path(_TARGET.value).stem, "source": Path(_SOURCE.value).stem}
        transfer.prepare(
            workdir,
            target=_TARGET.value,
            source=_SOURCE.value,
            users=_USERS.value,
            min_item_users=_MIN_ITEM_USERS.value,
            min_user_items=_MIN_USER_ITEMS.value,
            drop_twins=_DROP_TWINS.value,
        )
    question = transfer.Question(
        file.path,
        file.get_config,
        {**file.given, "data.dir": data},
        workdir,
        names,
        float(budget[1]) * _UNITS[budget[2]],
        _NAMES.value,
    )
    found = transfer.run(question, lambda work, done: findings.collect(work, done, showcase))
    print(page.publish(found, workdir))


if __name__ == "__main__":
    cli.run(main)
