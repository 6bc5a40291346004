"""Evaluates the best checkpoint of a run.

python launch/evaluate.py --workdir=DIR [--split=test|valid] [--full_ranking]
python launch/evaluate.py --workdir=DIR [--split=test|valid] --k=5,10,20

With --k the ranks that a finished run has kept (ranks.npz) are read again at other cut-offs.
"""

import json
from functools import partial
from typing import Any

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
    "Rank against all items with a training pair that the user has not touched in any split; data "
    "of --split=ratio: against all that the user has not in training, nor in validation for test.",
)
_K = flags.DEFINE_list(
    "k", None, "Cut-offs of HR, NDCG and MRR, by commas; by default that of the run."
)


def main() -> None:
    """Prints the metrics as JSON."""
    if _K.value is not None:
        print(json.dumps(_at_cuts(), indent=2))
        return
    from conet_jax.run.workdir import restore, stored_config

    cli.choose_platform(stored_config(_WORKDIR.value)[0])
    experiment, params, progress = restore(_WORKDIR.value, devices=0, data=_DATA.value)
    measure = _among_all if _FULL.value else _among_candidates
    metrics = measure(experiment, params)
    heading = {"full_ranking": _FULL.value, "best_epoch": progress["best_epoch"]}
    print(json.dumps({**heading, **metrics}, indent=2))


def _among_candidates(experiment: Any, params: Any) -> dict[str, dict[str, float]]:
    """The metrics of all held-out items, and of the warm ones, among their candidates."""
    from conet_jax.train import ranking

    held_out = getattr(experiment.dataset, _SPLIT.value)
    given = experiment.model, params, experiment.interactions, held_out
    ranked = ranking.rank_twice(*given, experiment.trained_items())
    names = _SPLIT.value, f"{_SPLIT.value}_warm"
    k = experiment.config.eval_k
    return {name: part.summarize(k=k) for name, part in zip(names, ranked, strict=True)}


def _among_all(experiment: Any, params: Any) -> dict[str, dict[str, float]]:
    """The metrics of the warm held-out items among all; by users' lists if they have several."""
    from conet_jax.data.load import touched_items
    from conet_jax.data.types import HeldOut, warm
    from conet_jax.train import full_ranking, list_metrics, ranking

    dataset, trained = experiment.dataset, experiment.trained_items()
    held_out, k = getattr(dataset, _SPLIT.value), experiment.config.eval_k
    kept, mask = warm(held_out, trained)
    of_warm = HeldOut(*(x[kept] for x in held_out._replace(mask=mask)))
    rank = partial(full_ranking.rank_full, experiment.model, params, experiment.interactions)
    if dataset.meta["options"].get("split") != "ratio":
        ranks = rank(of_warm, touched_items(dataset), trained)
        return {f"{_SPLIT.value}_warm": ranking.summarize(ranks, k=k)}
    known = touched_items(dataset, ("valid",) if _SPLIT.value == "test" else ())
    parts = {_SPLIT.value: (held_out, None), f"{_SPLIT.value}_warm": (of_warm, trained)}
    return {
        name: list_metrics.summarize(part.users, rank(part, known, listed), k=k)
        for name, (part, listed) in parts.items()
    }


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
