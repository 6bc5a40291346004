"""The paper's Table 2, and more, on one data set: searches, trains and tests every method.

python launch/table2.py --config=configs/NAME.py --workdir=DIR [--methods=a,b] [--seeds=5]
    [--trials=8] [--drop=1,2] [--config.data.dir=DIR] [--config.data.cold=600]

Each method gets the same number of trials on validation, then a run a seed of the best one, then
one test a run. Interrupted, the same command goes on where it was; processes may share a workdir
with --methods of their own. Writes table2.json and table2.md of all methods that are done.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from conet_jax import cli
from conet_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, without a variant; required. "
    "Its fields are set by --config.FIELD=VALUE; conet_jax/config.py has them all, with defaults.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of all that is written; required.", required=True
)
_METHODS = flags.DEFINE_list(
    "methods",
    None,
    "Variants to run; by default all but those of the authors' code and emcdr, emcdr_mlp, which "
    "differ from ials for users without target pairs alone (--config.data.cold=600).",
)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Runs a method, of seeds 0, 1, ….", lower_bound=1)
_TRIALS = flags.DEFINE_integer("trials", 8, "Trials of each search.", lower_bound=1)
_DROP = flags.DEFINE_list(
    "drop",
    [],
    "Train again with so many training interactions less a user: 1,2 for one and two; by "
    "default none.",
)
_DROP_METHODS = flags.DEFINE_list(
    "drop_methods", ["mlp", "conet", "lasso", "recipe_mlp", "recipe"], "Methods that --drop is for."
)
_KEEP = flags.DEFINE_boolean(
    "keep_checkpoints", True, "Keep a run's checkpoints once it has its result."
)


def main() -> None:
    """Makes the tables."""
    file = cli.config_file(_CONFIG)
    cli.choose_platform(file.config)
    if file.variant:
        raise InputError(
            f"--config names the variant {file.variant!r}: expected --methods={file.variant}"
        )
    try:
        drops = [int(text) for text in _DROP.value]
    except ValueError:
        drops = [0]
    if any(drop < 1 for drop in drops):
        raise InputError(f"--drop={','.join(_DROP.value)}: expected numbers from 1, such as 1,2")
    from conet_jax.studies import search, table2

    plan = table2.Study(
        file.path,
        file.get_config,
        file.given,
        Path(_WORKDIR.value),
        seeds=_SEEDS.value,
        trials=_TRIALS.value,
        keep_checkpoints=_KEEP.value,
        published=file.published,
    )
    methods = search.DEFAULT_METHODS if _METHODS.value is None else _METHODS.value
    table2.run(plan, methods, drops, _DROP_METHODS.value)


if __name__ == "__main__":
    cli.run(main)
