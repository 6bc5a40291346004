"""Trains a model, or goes on with a run that was interrupted.

python launch/train.py --config=configs/NAME.py[:variant] [--config.field=value ...]
"""

from absl import flags
from ml_collections import config_flags

from conet_jax import cli

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with a variant after a colon: configs/amazon.py:published."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, made if absent; by default runs/NAME[-variant]."
)


def main() -> None:
    """Runs the experiment."""
    config = cli.config_of(_CONFIG)
    cli.choose_platform(config)
    from conet_jax import experiment

    experiment.fit(config, _WORKDIR.value or cli.default_workdir(config))


if __name__ == "__main__":
    cli.run(main)
