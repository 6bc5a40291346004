"""Trains a model, or goes on with a run that was interrupted.

python launch/train.py --config=configs/NAME.py[:variant] [--data=DIR] [--config.field=value ...]

The plain config is CoNet-lasso as the paper has it, :recipe the recommended recipe;
conet_jax/variants.py has all variants. configs/default.py is for any data that launch/prepare.py
has made. With the extra "plots" a picture of the run, curves.svg, stands in its folder at the end.

On several machines the same command runs on each, with a --workdir that all of them see:
--coordinator=HOST:PORT --num_processes=N --process_id=I. Under Slurm, Open MPI, Kubernetes and on
TPU pods these flags are not needed.
"""

import importlib.util
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from conet_jax import cli

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with a variant after a colon: configs/amazon.py:published; required. "
    "Its fields are set by --config.FIELD=VALUE; conet_jax/config.py has them all, with defaults.",
)
_DATA = flags.DEFINE_string(
    "data", None, "Prepared data, in place of --config.data.dir; by default the config's."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, made if absent; by default runs/NAME-VARIANT."
)
_START_FROM = flags.DEFINE_string(
    "start_from",
    None,
    "Folder of an earlier run to start from, on other data: users, items and factors are matched "
    "by id, new ones are solved for or drawn, and the towers go on from where they are; by "
    "default none.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, for a run of several processes; by default taken from the cluster.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes of this run; by default taken from the cluster, or one."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0; by default taken from the cluster."
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
    cli.take_data(config, _DATA.value)
    from conet_jax.devices import processes

    processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    cli.choose_platform(config)
    from conet_jax.run.fit import fit

    workdir = _WORKDIR.value or cli.default_workdir(config)
    try:
        fit(config, workdir, tensorboard=_TENSORBOARD.value, start_from=_START_FROM.value)
    except processes.PeerLost as error:
        processes.leave(error)
    if processes.is_main() and importlib.util.find_spec("matplotlib") is not None:
        from conet_jax.studies import curves

        curves.draw(Path(workdir))


if __name__ == "__main__":
    cli.run(main)
