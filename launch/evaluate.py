"""Evaluates the best checkpoint of a run.

python launch/evaluate.py --workdir=DIR [--split=test|valid] [--full_ranking]
"""

import json

from absl import flags

from conet_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; required.", required=True)
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "valid"], "Held-out items to rank.")
_FULL = flags.DEFINE_boolean(
    "full_ranking",
    False,
    "Rank against all items with a training pair that the user has not touched in any split.",
)


def main() -> None:
    """Prints the metrics as JSON."""
    from conet_jax.data.load import touched_items
    from conet_jax.data.types import HeldOut, warm
    from conet_jax.run.workdir import restore, stored_config

    cli.choose_platform(stored_config(_WORKDIR.value)[0])
    from conet_jax.train import full_ranking, ranking

    experiment, params, progress = restore(_WORKDIR.value, devices=0)
    held_out, trained = getattr(experiment.dataset, _SPLIT.value), experiment.trained_items()
    given = experiment.model, params, experiment.interactions
    if _FULL.value:
        kept, mask = warm(held_out, trained)
        held_out = HeldOut(*(x[kept] for x in held_out._replace(mask=mask)))
        ranks = full_ranking.rank_full(*given, held_out, touched_items(experiment.dataset), trained)
        metrics = {f"{_SPLIT.value}_warm": ranks}
    else:
        everything, of_warm = ranking.rank_twice(*given, held_out, trained)
        metrics = {_SPLIT.value: everything.ranks, f"{_SPLIT.value}_warm": of_warm.ranks}
    k = experiment.config.eval_k
    metrics = {name: ranking.summarize(ranks, k=k) for name, ranks in metrics.items()}
    heading = {"full_ranking": _FULL.value, "best_epoch": progress["best_epoch"]}
    print(json.dumps({**heading, **metrics}, indent=2))


if __name__ == "__main__":
    cli.run(main)
