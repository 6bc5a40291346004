"""Evaluates the best checkpoint of a run.

python launch/evaluate.py --workdir=DIR [--split=test|valid] [--full_ranking]
python launch/evaluate.py --workdir=DIR [--split=test|valid] --k=5,10,20

With --k the ranks that a finished run has kept (ranks.npz) are read again at other cut-offs.
"""

import json

from absl import flags

from conet_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; required.", required=True)
_DATA = flags.DEFINE_string(
    "data", None, "Folder of the run's data; by default where they were, or next to the run."
)
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "valid"], "Held-out items to rank.")
_FULL = flags.DEFINE_boolean(
    "full_ranking",
    False,
    "Rank against all items with a training pair that the user has not touched in any split.",
)
_K = flags.DEFINE_list(
    "k", None, "Cut-offs of HR, NDCG and MRR, by commas; by default that of the run."
)


def main() -> None:
    """Prints the metrics as JSON."""
    if _K.value is not None:
        print(json.dumps(_at_cuts(), indent=2))
        return
    from conet_jax.data.load import touched_items
    from conet_jax.data.types import HeldOut, warm
    from conet_jax.run.workdir import restore, stored_config

    cli.choose_platform(stored_config(_WORKDIR.value)[0])
    from conet_jax.train import full_ranking, ranking

    experiment, params, progress = restore(_WORKDIR.value, devices=0, data=_DATA.value)
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


def _at_cuts() -> dict[str, dict[str, float]]:
    """The metrics of a finished run at the cut-offs of --k, by split."""
    from pathlib import Path

    from conet_jax.errors import InputError
    from conet_jax.run.workdir import read_ranks, stored_config
    from conet_jax.train import ranking

    if _FULL.value:
        raise InputError("--k reads the ranks among candidates: leave out --full_ranking")
    stored_config(_WORKDIR.value)
    path, found = Path(_WORKDIR.value) / "ranks.npz", {}
    for split in (_SPLIT.value, f"{_SPLIT.value}_warm"):
        try:
            ranked = ranking.Ranked(*read_ranks(path, split))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read as the ranks of a finished run ({error}): go on with the "
                "run, or leave out --k"
            ) from None
        found[split] = {}
        for text in _K.value:
            fewest = int(ranked.ranks.candidates.min())
            if not (text.isdigit() and 1 <= int(text) <= fewest):
                raise InputError(
                    f"--k is {text!r}: expected whole numbers from 1 to {fewest}, the fewest "
                    "candidates of a user"
                )
            found[split] |= ranked.summarize(k=int(text))
    return found


if __name__ == "__main__":
    cli.run(main)
