"""Ranks with the crossing of trained CoNets on, off, and fed by another user's source profile.

python launch/crossing.py --workdirs=DIR[,DIR...] [--split=test|valid]

The runs are of one config and data, a seed each. Prints the means and a paired t-test over users,
as published and of the warm items.
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
    from conet_jax.studies import crossing, statistics

    config = crossing.common_config(_WORKDIRS.value)
    cli.choose_platform(config)
    k = config["eval_k"][0]
    ranked = crossing.ranked(_WORKDIRS.value, split=_SPLIT.value, data=_DATA.value)
    runs = [ways for _, ways in ranked]
    for at, title in enumerate(("as published", "warm")):
        of_way = {way: [ways[way][at] for ways in runs] for way in crossing.WAYS}
        ndcg = {
            way: np.mean([statistics.ndcg_by_user(*own, k) for own in found], axis=0)
            for way, found in of_way.items()
        }
        rows = {way: [own.summarize(k=k) for own in found] for way, found in of_way.items()}
        print(f"{_SPLIT.value} split, {title}: {len(ndcg['on']):,} users, {len(runs)} runs\n")
        print(crossing.report(rows, ndcg, k))


if __name__ == "__main__":
    cli.run(main)
