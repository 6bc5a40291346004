"""What the reporting habits of CoNet's published code do to one trained model's figures.

For reporting only. After every epoch this ranks the test items beside the validation items, because
one of the habits is to choose the epoch on them; nothing found here selects a model, an epoch or a
hyper-parameter for any other use.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from conet_jax import metrics
from conet_jax.data.load import load_dataset
from conet_jax.data.types import Dataset, users_and_pairs
from conet_jax.files import make_report_folder, write_json, write_text
from conet_jax.run import lock, loop
from conet_jax.run.experiment import make_experiment
from conet_jax.run.fit import versions
from conet_jax.run.start import initial_state
from conet_jax.studies import runner
from conet_jax.studies.markdown import mean_cell, table
from conet_jax.studies.runner import Record
from conet_jax.train import ranking
from conet_jax.train.ranking import Ranks


class Habits(NamedTuple):
    """Habits of the published code (docs/paper.md); none of them is ours.

    Attributes:
      ties: the test item is listed first among the tied, not at a random place.
      misses: a miss counts 1 / (k + 1) in MRR, not 0.
      epochs: each metric is that of its own best epoch on test, not of the best on validation.
    """

    ties: bool = False
    misses: bool = False
    epochs: bool = False


ROWS = {
    "ours: ties by expectation, a miss counts 0, epoch chosen on validation": Habits(),
    "+ ties: the test item is listed first": Habits(ties=True),
    "+ MRR: a miss counts 1/{miss}": Habits(misses=True),
    "+ epoch: the best on test, for each metric apart": Habits(epochs=True),
    "all three": Habits(True, True, True),
}


def figures(test: list[Ranks], best_epoch: int, habits: Habits, *, k: int) -> dict[str, float]:
    """Returns the metrics of one run under some habits.

    Args:
      test: ranks of the test items after each epoch.
      best_epoch: the epoch chosen on validation, from 1.
      habits: which of them hold.
      k: the metrics' cut.

    Returns:
      The metrics of ``metrics.in_tables`` by name, means over users.

    Example:
      >>> constant = Ranks(*np.array([[0], [99], [99]]))  # a constant scorer: all tied
      >>> found = figures([constant], 1, Habits(), k=10)["hit_ratio"]
      >>> round(found, 12), figures([constant], 1, Habits(ties=True), k=10)["hit_ratio"]
      (0.1, 1.0)
    """
    shown = metrics.in_tables()

    def of_epoch(ranks: Ranks) -> dict[str, float]:
        tied = np.zeros_like(ranks.tied) if habits.ties else ranks.tied
        found = metrics.summarize(ranks.above, tied, ranks.candidates, k=k)
        if habits.misses:
            found[f"mrr@{k}"] = found[f"mrr_published@{k}"]
        return {metric.name: found[metric.key(k)] for metric in shown}

    if not habits.epochs:
        return of_epoch(test[best_epoch - 1])
    by_epoch = [of_epoch(ranks) for ranks in test]
    return {
        metric.name: (max if metric.higher_is_better else min)(
            epoch[metric.name] for epoch in by_epoch
        )
        for metric in shown
    }


def measure(config: ConfigDict, dataset: Dataset) -> Record:
    """Trains once and returns the figures under each row's habits.

    Returns:
      ``seed``, ``epochs``, ``best_epoch`` (on validation), ``dead`` (by domain, the number of
      epochs after which its tower was dead), ``rows`` (by name, see ``figures``).
    """
    experiment = make_experiment(config, dataset)
    test, best_epoch, dead = [], 0, {}
    for end in loop.train(experiment, initial_state(experiment)):
        test.append(
            ranking.rank_held_out(
                experiment.model, end.params, experiment.interactions, dataset.test
            )
        )
        best_epoch = end.progress.best_epoch
        for domain in ("target", "source"):
            if any(warning.startswith(f"the {domain} tower is dead") for warning in end.warnings):
                dead[domain] = dead.get(domain, 0) + 1
    k = config.eval_k[0]
    return {
        "seed": config.seed,
        "epochs": len(test),
        "best_epoch": best_epoch,
        "dead": dead,
        "rows": {
            name.format(miss=k + 1): figures(test, best_epoch, habits, k=k)
            for name, habits in ROWS.items()
        },
    }


def _single(run: runner.Run, dataset: Dataset) -> Record:
    return measure(run.config, dataset)


def _numbers(record: Record) -> list[Any]:
    found = [record["seed"], record["epochs"], record["best_epoch"], *record["dead"].values()]
    return [*found, *(value for row in record["rows"].values() for value in row.values())]


KIND = runner.Kind("habits", _single, read=partial(runner.read, numbers=_numbers))


def report(
    config: ConfigDict, workdir: str | Path, *, seeds: int = 3, dataset: Dataset | None = None
) -> dict[str, Any]:
    """Trains ``seeds`` runs from ``config.seed`` on, and writes habits.json and habits.md.

    Args:
      config: of any variant.
      workdir: made if absent.
      seeds: number of runs.
      dataset: the data; by default that of the config.

    Returns:
      The contents of habits.json: the runs, their ``mean`` and ``std`` (null of one run) by row
      and metric, and what they were made from. The same command gives the same contents.

    Raises:
      InputError: the workdir cannot be written, or the config is wrong.
    """
    workdir = Path(workdir)
    make_report_folder(workdir)
    dataset = load_dataset(config) if dataset is None else dataset
    planned = []
    for seed in range(config.seed, config.seed + seeds):
        seeded = ConfigDict(config.to_dict())
        seeded.seed = seed
        planned.append(runner.plan(seeded, dataset, workdir, KIND))

    def done(run: runner.Run, record: Record) -> None:
        print(_note(record), flush=True)

    with lock.owned(workdir):
        outcome = runner.run(planned, workdir, runner.Datasets(dataset), KIND, done=done)
        records = outcome.complete()
        kept = ("seed", "epochs", "best_epoch", "dead", "rows")
        runs = [{name: records[run.key][name] for name in kept} for run in planned]
        return _report(config, workdir, dataset, runs)


def _report(
    config: ConfigDict, workdir: Path, dataset: Dataset, runs: list[Record]
) -> dict[str, Any]:
    names = [metric.name for metric in metrics.in_tables()]
    over_seeds = {
        name: {metric: [run["rows"][name][metric] for run in runs] for metric in names}
        for name in runs[0]["rows"]
    }
    result = {
        "mean": _each(over_seeds, lambda values: float(np.mean(values))),
        "std": _each(over_seeds, lambda values: float(np.std(values, ddof=1)))
        if len(runs) > 1
        else None,
        "runs": runs,
        **{f"test_{what}": n for what, n in users_and_pairs(dataset.test.users).items()},
        "config": json.loads(config.to_json()),
        "dataset_hash": dataset.meta["hash"],
        "versions": versions(),
    }
    write_json(workdir / "habits.json", result)
    text = markdown(result)
    write_text(workdir / "habits.md", text)
    print(text)
    return result


def _each(table: dict[str, dict[str, Any]], function: Any) -> dict[str, dict[str, float]]:
    return {
        row: {metric: function(values) for metric, values in cells.items()}
        for row, cells in table.items()
    }


def _whom(result: dict[str, Any]) -> str:
    """The test users, or their items where these are more."""
    users = f"{result['test_users']:,} test users"
    return f"{result['test_pairs']:,} items of {users}" if "test_pairs" in result else users


def markdown(result: dict[str, Any]) -> str:
    """Returns a result of ``report`` as a small Markdown page."""
    config, runs, std = result["config"], result["runs"], result["std"]
    k = config["eval_k"][0]
    lines = [f"# Habits of reporting: {config['name']} {config['variant']}".rstrip(), ""]
    cells = [
        [row]
        + [
            mean_cell({"mean": mean, "std": std[row][metric] if std else None})
            for metric, mean in means.items()
        ]
        for row, means in result["mean"].items()
    ]
    lines += table(["", *(metric.heading(k) for metric in metrics.in_tables())], cells)
    seeds = f"mean ± standard deviation of {len(runs)} seeds" if std else "one seed"
    lines += [
        "",
        f"The same trained models in every row; means over {_whom(result)}, "
        f"{seeds}. Data {result['dataset_hash'][:12]}.",
        "",
        *(f"- {_note(run)}" for run in runs),
        "",
    ]
    return "\n".join(lines)


def _note(run: dict[str, Any]) -> str:
    dead = [
        f"the {domain} tower was dead after {count} of them"
        for domain, count in run["dead"].items()
    ]
    return (
        f"seed {run['seed']}: {run['epochs']} epochs, best on validation {run['best_epoch']}; "
        + ("; ".join(dead) or "no tower was dead")
    )
