"""Ranks with the crossing of trained CoNets on, off, and fed by another user's source profile.

python launch/crossing.py --workdirs=DIR[,DIR...] [--split=test|valid]

The runs are of one config and data, a seed each; prints the means and a paired t-test over users.
"""

import numpy as np
from absl import flags

from conet_jax import cli

_WORKDIRS = flags.DEFINE_list(
    "workdirs", None, "Folders of runs, a seed each; required.", required=True
)
_DATA = flags.DEFINE_string(
    "data", None, "Folder of the runs' data; by default where they were, or next to the run."
)
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "valid"], "Held-out items to rank.")


def main() -> None:
    """Prints the table."""
    from conet_jax import metrics
    from conet_jax.run.workdir import restore
    from conet_jax.studies import crossing, statistics
    from conet_jax.train import ranking

    cli.choose_platform(crossing.common_config(_WORKDIRS.value))

    rows = {way: [] for way in crossing.WAYS}
    ndcg = {way: [] for way in crossing.WAYS}
    for workdir in _WORKDIRS.value:
        experiment, params, _ = restore(workdir, data=_DATA.value)
        held_out, k = getattr(experiment.dataset, _SPLIT.value), experiment.config.eval_k[0]
        for way in crossing.WAYS:
            arguments = crossing.switched(experiment.model, params, experiment.interactions, way)
            ranks = ranking.rank_held_out(experiment.model, *arguments, held_out)
            rows[way].append(ranking.summarize(ranks, k=k))
            values = metrics.ndcg(ranks.above, ranks.tied, k=k)
            ndcg[way].append(statistics.by_user(held_out.users, values))
    means = {way: np.mean(values, axis=0) for way, values in ndcg.items()}
    print(f"{_SPLIT.value} split, {len(means['on']):,} users, {len(rows['on'])} runs\n")
    print(crossing.report(rows, means, k))


if __name__ == "__main__":
    cli.run(main)
