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
    from conet_jax import experiment

    cli.choose_platform(experiment.stored_config(_WORKDIR.value)[0])
    from conet_jax import evaluation

    task, params, progress = experiment.restore(_WORKDIR.value, devices=0)
    held_out = getattr(task.dataset, _SPLIT.value)
    if _FULL.value:
        touched = experiment.touched_items(task.dataset)
        ranks = evaluation.rank_full(task.model, params, task.interactions, held_out, touched)
    else:
        ranks = evaluation.rank_held_out(task.model, params, task.interactions, held_out)
    metrics = evaluation.summarize(ranks, k=task.config.eval_k)
    heading = {"split": _SPLIT.value, "full_ranking": _FULL.value}
    print(json.dumps({**heading, "best_epoch": progress["best_epoch"], **metrics}, indent=2))


if __name__ == "__main__":
    cli.run(main)
