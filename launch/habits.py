"""Shows what the published code's habits of reporting do to the same trained model's figures.

python launch/habits.py --config=configs/NAME.py:published --workdir=DIR [--seeds=3] \
    [--config.field=...]

One table: ties counted in the test item's favour, a miss counted in MRR, the epoch chosen on test.
For reporting only: it ranks test items after every epoch, and selects nothing for any other use.
"""

from absl import flags
from ml_collections import config_flags

from conet_jax import cli

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with a variant after a colon: configs/amazon.py:published; required. "
    "Its fields are set by --config.FIELD=VALUE; conet_jax/config.py has them all, with defaults.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of habits.md and .json; required.", required=True
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs, from config.seed on.", lower_bound=1)


def main() -> None:
    """Trains, prints and writes the table."""
    config = cli.config_of(_CONFIG)
    cli.choose_platform(config)
    from conet_jax.studies import habits

    habits.report(config, _WORKDIR.value, seeds=_SEEDS.value)


if __name__ == "__main__":
    cli.run(main)
