"""From the finished runs of a transfer study to the contents of its report.json."""

import shlex
from collections.abc import Callable
from typing import Any

import numpy as np

from conet_jax import metrics
from conet_jax.data import audit
from conet_jax.data.types import Dataset, warm_users
from conet_jax.models import diagnostics
from conet_jax.studies import crossing, search, verdict
from conet_jax.studies.clock import in_words
from conet_jax.studies.evidence import (
    ALONE,
    CONTROL,
    JOINED,
    RECIPE,
    Runs,
    baseline_of,
    compare,
    cut,
)
from conet_jax.studies.statistics import ndcg_by_user, spread_of
from conet_jax.studies.transfer import MAX_TRIALS, Work
from conet_jax.variants import VARIANTS

FORMAT = 1
_FEW_SHARED = 2000  # users of both domains below which a gain is hard to see (README, Limits)

Json = dict[str, Any]
# (folder of a run with the source, of one without or None, whether to show users' names) -> the
# parts "items" and "examples" of the report; serve.showcase has it, and studies import no serve.
Showcase = Callable[..., Json]


def collect(work: Work, done: dict[str, Runs], showcase: Showcase) -> Json:
    """Returns the contents of report.json.

    Args:
      work: the finished study.
      done: its runs by method.
      showcase: lists of items, see ``serve.showcase``.
    """
    question, dataset = work.question, work.dataset
    baseline = baseline_of(done)
    recipe, alone = done[RECIPE], done[baseline]
    main = compare(recipe, alone)
    control = compare(recipe, done[CONTROL]) if CONTROL in done else None
    joined = compare(recipe, done[JOINED]) if JOINED in done else None
    found = verdict.decide(main, control)
    groups = _groups(recipe, alone, dataset)
    k = cut(recipe.results[0]["test_warm"])
    other = done[baseline].folders[0] if baseline != "popularity" else None
    shown = showcase(recipe.folders[0], other, show_names=question.show_names)
    wins = _winner(found.outcome, baseline, joined)
    return {
        "format": FORMAT,
        "names": question.names,
        "k": k,
        "data": {"hash": dataset.meta["hash"], **dataset.meta["counts"]},
        "verdict": {
            "outcome": found.outcome,
            "baseline": baseline,
            "main": verdict.as_json(main),
            "published": verdict.as_json(compare(recipe, alone, "test")),
            "control": verdict.as_json(control),
            "joined": verdict.as_json(joined),
            "whom": verdict.whom(groups["target"], question.names["target"]),
            "unsettled": [*found.reasons, *_cut_short(work, done, main, control)],
            "why": _why(main, found.outcome, dataset),
        },
        "methods": [_row(name, runs, alone, baseline) for name, runs in done.items()],
        "failures": work.failures,
        "groups": groups,
        "carried": {**carried(recipe, k), "items": shown["items"], "of": shown["of"]},
        "examples": shown["examples"],
        "beware": beware(dataset),
        "next": _next(done, wins),
        "times": {"seconds": round(work.clock.spent, 1), "budget": question.budget},
    }


def _row(name: str, runs: Runs, alone: Runs, baseline: str) -> Json:
    shown = metrics.in_tables()
    says = "the recipe, trained with the source of another user: the control"
    row: Json = {
        "method": name,
        "says": says if name == CONTROL else VARIANTS[name].says,
        "knows_source": name not in ALONE,
        "trials": runs.trials,
        "seeds": len(runs.results),
        "fixed": runs.fixed,
        "chosen": runs.fields,
        "valid": runs.valid,
        "parameters": runs.results[0]["parameters"],
    }
    for part, split in (("warm", "test_warm"), ("published", "test")):
        k = cut(runs.results[0][split])
        row[part] = {
            metric.name: spread_of([result[split][metric.key(k)] for result in runs.results])
            for metric in shown
        }
    row["gain"] = None if name == baseline else verdict.as_json(compare(runs, alone))
    return row


def _groups(recipe: Runs, alone: Runs, dataset: Dataset) -> Json:
    """The gain by target and by source interactions, and of the users of the target alone."""
    users = warm_users(dataset)
    ours, theirs = recipe.ndcg["test_warm"], alone.ndcg["test_warm"]
    fixed = (recipe.fixed, alone.fixed)
    degrees = {d: np.diff(getattr(dataset, d).indptr)[users] for d in ("target", "source")}
    found: Json = {
        "target": verdict.by_target(ours, theirs, degrees["target"], fixed=fixed),
        "source": verdict.by_source(ours, theirs, degrees["source"], fixed=fixed),
        "target_only": None,
    }
    split = "test_target_only_warm"
    both = split in recipe.ndcg and split in alone.ndcg
    if both and recipe.ndcg[split].shape[1] > 1:
        found["target_only"] = verdict.as_json(compare(recipe, alone, split))
    return found


def carried(recipe: Runs, k: int) -> Json:
    """What the cross connections carry at inference, and the matrices themselves.

    Args:
      recipe: finished runs of a model with cross connections, with their checkpoints.
      k: the cut of NDCG.

    Returns:
      ``crossing``, a row for each of ``crossing.WAYS``; ``matrices`` of the first run.
    """
    ndcg: dict[str, list[np.ndarray]] = {way: [] for way in crossing.WAYS}
    matrices: list[Json] = []
    for params, ways in crossing.ranked(recipe.folders[: verdict.SEEDS]):
        matrices = matrices or _matrices(params.dense)
        for way, (_, warm) in ways.items():
            ndcg[way].append(ndcg_by_user(*warm, k))
    stacked = {way: np.stack(values) for way, values in ndcg.items()}
    rows = [
        {
            "way": way,
            "ndcg": float(values.mean()),
            "gain": None
            if way == "on"
            else verdict.as_json(verdict.gain(values, stacked["on"], fixed=(True, True))),
        }
        for way, values in stacked.items()
    ]
    return {"crossing": rows, "seeds": len(stacked["on"]), "matrices": matrices}


def _matrices(dense: Json) -> list[Json]:
    """Each H^l, rows in, columns out, to four digits."""
    found = []
    for name in sorted(name for name in dense if name.startswith("H_")):
        h = np.asarray(diagnostics.matrix(dense[name]), np.float64)
        found.append(
            {
                "name": name,
                "shape": list(h.shape),
                "zeros": float((h == 0).mean()),
                "mean_abs": float(np.abs(h).mean()),
                "values": [[float(f"{x:.4g}") for x in row] for row in h],
            }
        )
    return found


def _cut_short(
    work: Work, done: dict[str, Runs], main: verdict.Gain, control: verdict.Gain | None
) -> list[str]:
    """What a budget that was too small has left out."""
    found = []
    seeds = len(done[RECIPE].results)
    narrow = main.narrow and (control is None or control.narrow)
    if work.ended_at >= work.clock.budget and not narrow:
        found.append(
            f"the budget of {in_words(work.clock.budget)} ended after "
            f"{seeds} seed{'' if seeds == 1 else 's'}; more would narrow the intervals"
        )
    if work.trials < MAX_TRIALS:
        found.append(
            f"the budget was enough for {work.trials} of {MAX_TRIALS} trials of each "
            "method: better settings may be there, of each; a larger --budget in a new --workdir "
            "tries more"
        )
    return found


def _why(main: verdict.Gain, outcome: str, dataset: Dataset) -> list[str]:
    """Reasons that the data give for what was found."""
    reasons = []
    if dataset.num_shared < _FEW_SHARED and main.low is not None and main.low <= 0:
        reasons.append(
            f"only {dataset.num_shared:,} users are in both domains: of so few a small gain is "
            "hard to see"
        )
    twins = dataset.meta["audit"].get("twins", {})
    share = max(twins.get("test_in_source", 0.0), twins.get("valid_in_source", 0.0))
    if outcome == "helps" and share > 0.005 and not twins.get("dropped_source_interactions"):
        reasons.append(
            f"beware: for {verdict.percent(share)} of the users the held-out item stands in the "
            "source under another id (a twin): part of the gain is that"
        )
    return reasons


def beware(dataset: Dataset) -> list[str]:
    """Returns what could mislead, in sentences."""
    meta, counts = dataset.meta, dataset.meta["counts"]
    lines = [line[:1].upper() + line[1:] + "." for line in audit.warnings(meta["audit"])]
    twins = meta["audit"].get("twins")
    if twins is None:
        lines.append(
            "Twins: nobody has looked for items that stand in both domains under two ids; "
            "launch/prepare.py does, and its --drop_twins takes them out."
        )
    elif twins["dropped_source_interactions"]:
        lines.append(
            f"Twins: {twins['pairs']:,} source items had nearly the users of a target item, as one "
            "product under two ids has; they were taken out of the source "
            f"({twins['dropped_source_interactions']:,} interactions)."
        )
    else:
        lines.append(f"Twins: {twins['pairs']:,} pairs of items look like one product twice.")
    cold = meta["audit"].get("cold", {}).get("test", {})
    if cold.get("pairs"):
        lines.append(
            f"Cold items: {round(cold['cold_positives'] * cold['pairs']):,} of {cold['pairs']:,} "
            "test items have no training pair. The warm figures, on which the verdict stands, "
            "leave them out."
        )
    users = meta["audit"].get("users")
    if users:
        lines.append(
            f"Overlap: {users['shared']:,} users are in both domains, {users['target_only']:,} in "
            f"the target alone, {users['source_only']:,} in the source alone (before items and "
            "users with few interactions were left out)."
        )
    if meta["options"].get("split") in ("random", "ratio"):
        lines.append(
            "Dates: the test items were drawn at random, so that training may know what came "
            "later. --split=latest of launch/prepare.py holds out the last ones."
        )
    lines.append(
        f"Size: {counts['test_users']:,} users of both domains have a test item, ranked among "
        f"{meta['options']['candidates']} others. Among all items every figure would be smaller."
    )
    return lines


def _winner(outcome: str, baseline: str, joined: verdict.Gain | None) -> str:
    """What to take: the simplest of what nothing was seen to beat."""
    if outcome in ("helps", "not its content"):
        plain = joined is not None and joined.low is not None and joined.low <= 0
        return JOINED if plain and outcome == "helps" else RECIPE
    return baseline


def _next(done: dict[str, Runs], name: str) -> Json:
    """The commands that train and use the winner, and train the plain alternative."""
    runs = done[name]
    folder = runs.folders[0]
    workdir = f"--workdir={folder}"
    recommend = ["python", "launch/recommend.py", workdir, "--user=ID", "--k=10"]
    everyone = ["python", "launch/recommend.py", workdir, "--all", "--out=lists.csv"]
    steps = [
        {"what": "It is trained, as the run of seed 0, by", "command": runs.command},
        {"what": "Recommend to one user.", "command": shlex.join(recommend)},
        {"what": "Recommend to all.", "command": shlex.join(everyone)},
    ]
    if name == RECIPE and JOINED in done:
        plain = "Or, plainer: joined implicit ALS, which trains in seconds."
        steps.append({"what": plain, "command": done[JOINED].command})
    return {
        "method": name,
        "says": VARIANTS[name].says,
        "searched": bool(search.SPACES[name]),
        "steps": steps,
    }
