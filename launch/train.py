"""Trains a model, or goes on with a run that was interrupted.

python launch/train.py --config=configs/NAME.py[:variant] [--config.field=value ...]
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
    "workdir", None, "Folder of the run, made if absent; by default runs/NAME[-variant]."
)
_TENSORBOARD = flags.DEFINE_boolean(
    "tensorboard",
    False,
    "Write event files to WORKDIR/tensorboard, too; needs the extra: pip install "
    '"conet-jax[tensorboard]".',
)


def main() -> None:
    """Runs the experiment."""
    config = cli.config_of(_CONFIG)
    cli.choose_platform(config)
    from conet_jax import experiment

    workdir = _WORKDIR.value or cli.default_workdir(config)
    experiment.fit(config, workdir, tensorboard=_TENSORBOARD.value)


if __name__ == "__main__":
    cli.run(main)
