"""Evaluates the best checkpoint of a run.

python launch/evaluate.py --workdir=DIR [--split=test|valid] [--full_ranking]
"""

import json

from absl import flags

from conet_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; required.", required=True)
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "valid"], "Held-out items to rank.")
_FULL = flags.DEFINE_boolean(
    "full_ranking", False, "Rank against all items that the user has not touched in any split."
)


def main() -> None:
    """Prints the metrics as JSON."""
    from conet_jax.data.load import touched_items
    from conet_jax.run.workdir import restore, stored_config

    cli.choose_platform(stored_config(_WORKDIR.value)[0])
    from conet_jax.train import ranking

    experiment, params, progress = restore(_WORKDIR.value, devices=0)
    held_out = getattr(experiment.dataset, _SPLIT.value)
    if _FULL.value:
        touched = touched_items(experiment.dataset)
        ranks = ranking.rank_full(
            experiment.model, params, experiment.interactions, held_out, touched
        )
    else:
        ranks = ranking.rank_held_out(experiment.model, params, experiment.interactions, held_out)
    metrics = ranking.summarize(ranks, k=experiment.config.eval_k)
    heading = {"split": _SPLIT.value, "full_ranking": _FULL.value}
    print(json.dumps({**heading, "best_epoch": progress["best_epoch"], **metrics}, indent=2))


if __name__ == "__main__":
    cli.run(main)
