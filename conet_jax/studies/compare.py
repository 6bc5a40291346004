"""Finished runs side by side: what their configs differ in, their metrics, whether it is chance.

Runs of one config that differ in the seed are one row, a user's metric being the mean over them;
rows are tested against the first over the same users.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conet_jax import config as config_lib
from conet_jax import metrics
from conet_jax.data.types import users_and_pairs
from conet_jax.errors import InputError
from conet_jax.run.workdir import read_ranks, read_result, stored_config
from conet_jax.studies import tables
from conet_jax.studies.markdown import difference_cells, mean_cell, table
from conet_jax.studies.statistics import by_user, spread_of
from conet_jax.train.ranking import Ranks

# Fields that name a run, or leave its result as it is.
NAMES = ("name", "variant", "data.dir", "data.prepare", "devices", "platform")


class Run(NamedTuple):
    """A finished run.

    Attributes:
      workdir: its folder.
      config: fields by dotted name; of ``eval_k`` the first.
      result: contents of result.json.
      users: int[n], of the held-out items, a user for each.
      ranks: of the held-out items.
    """

    workdir: Path
    config: dict[str, Any]
    result: dict[str, Any]
    users: np.ndarray
    ranks: Ranks


def read(workdir: str | Path, split: str) -> Run:
    """Reads a run.

    Args:
      workdir: its folder.
      split: "test", "test_warm", "valid" or "valid_warm".

    Raises:
      InputError: there is no run, it has not ended, or its files cannot be read.
    """
    workdir = Path(workdir)
    config, _ = stored_config(workdir)
    path = workdir / "result.json"
    if not path.exists():
        raise InputError(
            f"the run in {workdir} has no result yet; go on with it: python launch/train.py "
            f"--workdir={workdir} and the --config it was begun with"
        )
    try:
        result = read_result(path)
        users, ranks = read_ranks(workdir / "ranks.npz", split)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{workdir} cannot be read as a finished run ({error}); launch/train.py with the same "
            "--workdir and --config writes its files anew"
        ) from None
    fields = config_lib.flatten(config)
    fields["eval_k"] = fields["eval_k"][0]  # the others have chosen nothing
    return Run(workdir, fields, result, users, ranks)


def report(
    workdirs: Sequence[str | Path], *, split: str = "test_warm", k: int | None = None
) -> str:
    """Returns the comparison as Markdown.

    Args:
      workdirs: folders of runs on the same data.
      split: held-out items to compare on, "test_warm" say.
      k: cut of HR, NDCG and MRR; by default the first of the first run's ``eval_k``.

    Raises:
      InputError: a run cannot be read, or the runs are on different data.
    """
    runs = [read(workdir, split) for workdir in workdirs]
    first = runs[0]
    for run in runs[1:]:
        hashes = [r.result["dataset"]["hash"][:12] for r in (first, run)]
        if hashes[0] != hashes[1] or not np.array_equal(first.users, run.users):
            raise InputError(
                f"{run.workdir} is a run on other data than {first.workdir}: its hash is "
                f"{hashes[1]}…, not {hashes[0]}…, and their metrics do not compare: "
                "name runs on one data set"
            )
    k = k or first.config["eval_k"]
    groups = _groups(runs)
    differing = _differing([group[0].config for group in groups])
    names = [metric.key(k) for metric in metrics.in_tables()]
    head = ["", "run", *differing, "seeds", *names, "epochs", "parameters", "seconds"]
    rows, ndcg = [], []
    for number, group in enumerate(groups, 1):
        summaries = [metrics.summarize(*run.ranks, k=k) for run in group]
        spreads = [spread_of([summary[name] for summary in summaries]) for name in names]
        values = np.mean([metrics.ndcg(*run.ranks[:2], k=k) for run in group], axis=0)
        ndcg.append(by_user(first.users, values))
        rows.append(
            [
                str(number),
                _name(group),
                *(str(group[0].config.get(field, "-")) for field in differing),
                ", ".join(str(run.config["seed"]) for run in group),
                *map(mean_cell, spreads),
                f"{np.mean([run.result['epochs'] for run in group]):.4g}",
                f"{group[0].result['parameters']:,}",
                f"{np.mean([run.result['seconds'] for run in group]):,.1f}",
            ]
        )
    counts = f"{len(runs)} runs on data {first.result['dataset']['hash'][:12]}"
    found = users_and_pairs(first.users)
    items = f", {found['pairs']:,} items" if "pairs" in found else ""
    whose = f"{counts}, {split} split, {found['users']:,} users{items}."
    lines = [whose, "", *table(head, rows)]
    if len(groups) > 1:
        lines += ["", *_tests(ndcg, k)]
    if items:
        lines += ["", "The first table has means over items; gain and tests are over users' means."]
    return "\n".join(lines)


def _groups(runs: list[Run]) -> list[list[Run]]:
    """Runs that differ in the seed alone, in the order of the first of each."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        fields = {name: value for name, value in run.config.items() if name not in NAMES}
        key = json.dumps(fields | {"seed": None}, sort_keys=True)
        groups.setdefault(key, []).append(run)
    for group in groups.values():
        seeds = [run.config["seed"] for run in group]
        if len(set(seeds)) < len(seeds):
            raise InputError(
                f"{' and '.join(str(run.workdir) for run in group)} hold one config twice with "
                f"the same seed: name one of them"
            )
    return list(groups.values())


def _differing(configs: list[dict[str, Any]]) -> list[str]:
    fields = dict.fromkeys(name for config in configs for name in config)
    return [
        name
        for name in fields
        if name not in (*NAMES, "seed")
        and any(config.get(name) != configs[0].get(name) for config in configs)
    ]


def _name(group: list[Run]) -> str:
    """The folder; of several the longest common one with the number that are in it."""
    if len(group) == 1:
        return str(group[0].workdir)
    parts = [run.workdir.parts for run in group]
    common = [part[0] for part in zip(*parts, strict=False) if len(set(part)) == 1]
    return f"{Path(*common)} ({len(group)})"


def _tests(ndcg: list[np.ndarray], k: int) -> list[str]:
    head = ["against 1", f"NDCG@{k}, gain", "p", "difference"]
    base, cells = float(ndcg[0].mean()), []
    for number, values in enumerate(ndcg[1:], 2):
        gain = f"{100 * (float(values.mean()) / base - 1):+.2f}%" if base else "-"
        cells.append([str(number), gain, *difference_cells(tables.against(values, ndcg[0]))])
    return [
        *table(head, cells),
        "",
        "p: paired t-test over users, each averaged over the seeds; difference with the 95% "
        "interval of a paired bootstrap over users.",
    ]
