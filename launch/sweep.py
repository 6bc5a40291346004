"""Tries many values of config fields, with several seeds, and says which is best on validation.

python launch/sweep.py --config=configs/NAME.py[:variant] --workdir=DIR
    (--grid=config.FIELD=VALUE,VALUE... ... | --trials=N --space=... ...)
    [--seeds=1] [--config.field=value ...]

Each --grid is a field with its values, and every combination a point: --grid='config.l1=0,1e-6'
--grid='config.layers=(64,32),(32,16)'. A random search draws --trials points: the first is the
config as it is, the others from --space='config.learning_rate=log(1e-4,1e-2)',
--space='config.dropout=uniform(0,0.5)', --space='config.negatives=1,4', or --space=default, what
launch/table2.py searches for the variant. Without either, sweep(add) of the config file adds the
points.

Runs that differ in the real-valued fields learning_rate, target_weight, l1, l2, dropout,
negative_weight and in the seed alone are trained side by side in one program. Interrupted, the same
command goes on. Writes sweep.csv, sweep.md, sweep.png; nothing here looks at a test item.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from conet_jax import cli
from conet_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with a variant after a colon: configs/movies_books.py:lasso; required. "
    "Its fields are set by --config.FIELD=VALUE; conet_jax/config.py has them all, with defaults.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of all that is written; required.", required=True
)
_GRID = flags.DEFINE_multi_string("grid", [], "A field and its values")
_SPACE = flags.DEFINE_multi_string("space", [], "A field and its range, or default")
_TRIALS = flags.DEFINE_integer(
    "trials", None, "Points of a random search; no default.", lower_bound=1
)
_DRAW_SEED = flags.DEFINE_integer("draw_seed", 0, "Seed of the draws of --space.", lower_bound=0)
_SEEDS = flags.DEFINE_integer("seeds", 1, "Runs a point, from config.seed on.", lower_bound=1)
_MEMBERS = flags.DEFINE_integer(
    "members", 32, "Most runs trained in one program: bounds its memory.", lower_bound=1
)
_JOBS = flags.DEFINE_integer("jobs", 1, "Processes that share programs and runs.", lower_bound=1)


def main() -> None:
    """Sweeps."""
    file = cli.config_file(_CONFIG)
    if (_TRIALS.value is None) != (not _SPACE.value):
        raise InputError("a random search needs both --trials=N and --space=... (see --help)")
    if _GRID.value and _SPACE.value:
        raise InputError("--grid and --space are two ways to choose points: give one of them")
    if not (_GRID.value or _SPACE.value or file.sweep):
        raise InputError(
            "nothing to sweep: give --grid=config.FIELD=VALUE,VALUE, or --trials=N --space=..., "
            f"or write sweep(add) in {file.path}"
        )
    cli.choose_platform(file.config)
    from conet_jax.studies import points, search, sweep

    if _GRID.value:
        swept = points.parse_grid(_GRID.value, file.config)
    elif _SPACE.value:
        space = points.parse_space(_SPACE.value, file.config)
        swept = [{}, *search.draws(space, _TRIALS.value - 1, _DRAW_SEED.value)]
    else:
        swept = points.stored_points(file.sweep, file.config)
    sweep.run(
        sweep.Sweep(
            file.path + (f":{file.variant}" if file.variant else ""),
            file.config,
            file.given,
            Path(_WORKDIR.value),
            swept,
            seeds=_SEEDS.value,
            members=_MEMBERS.value,
            jobs=_JOBS.value,
        )
    )


if __name__ == "__main__":
    cli.run(main)
