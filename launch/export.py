"""Writes a trained model, or prepared data, as files that other programs read.

python launch/export.py --workdir=DIR [--data=DIR] --out=DIR
python launch/export.py --data=DIR --out=DIR

The first: embeddings, dense parameters, raw ids and the scoring function of a run's best checkpoint
(conet_jax/export.py says what is in each file). It needs an extra: pip install -e ".[export]".

The second: prepared data as RecBole's atomic files, with their split and candidates;
launch/prepare.py --recbole=DIR makes prepared data of them again.
"""

from absl import flags

from conet_jax import cli
from conet_jax.errors import InputError

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a run, to export its model; by default none."
)
_DATA = flags.DEFINE_string(
    "data",
    None,
    "Folder of prepared data, to export to RecBole; with --workdir that of the run's data, by "
    "default where they were, or next to the run.",
)
_OUT = flags.DEFINE_string("out", None, "Folder to write, new or empty; required.", required=True)


def main() -> None:
    """Exports the one or the other."""
    if _WORKDIR.value is None and _DATA.value is None:
        raise InputError("expected one of --workdir=DIR (a model) and --data=DIR (prepared data)")
    if _WORKDIR.value is None:
        from conet_jax.data import recbole, store

        recbole.save(store.load(_DATA.value), _OUT.value)
        print(f"written to {_OUT.value}; RecBole reads it with\n{recbole.settings(_OUT.value)}")
        return

    from conet_jax.run.experiment import for_inference
    from conet_jax.run.workdir import restore, stored_config

    cli.choose_platform(stored_config(_WORKDIR.value)[0])
    from conet_jax.serve import export

    export.check_writable(_OUT.value)
    experiment, params, _ = restore(_WORKDIR.value, data=_DATA.value)
    experiment, params = for_inference(experiment, params)
    export.save(experiment, params, _OUT.value)
    print(f"written to {_OUT.value}")


if __name__ == "__main__":
    cli.run(main)
