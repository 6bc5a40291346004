"""Ranking: all users in one program against one call a user; memory; the whole catalogue."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import data
from benchmarks.report import Report
from conet_jax.data.load import touched_items
from conet_jax.data.types import HeldOut
from conet_jax.models.base import Model
from conet_jax.run.start import initial_state
from conet_jax.train import full_ranking, ranking
from conet_jax.train.state import settled


def measure(report: Report, scale: str) -> None:
    """Times the ranker."""
    dataset = data.dataset(scale)
    test = dataset.test
    for inference in ("target", "cross"):
        experiment = data.experiment_on(dataset, inference=inference)
        params = settled(initial_state(experiment), experiment.hyper.learning_rate)

        def everyone(experiment: Any = experiment, params: Any = params) -> None:
            ranking.rank_held_out(experiment.model, params, experiment.interactions, test)

        pairs = len(test.users) * (1 + test.candidates.shape[1])
        suffix = "" if inference == "target" else "_cross"
        seconds = report.time({f"evaluate_pairs{suffix}": (everyone, pairs)})
        report.rates[f"eval_pairs_per_second{suffix}"] = 1 / seconds[f"evaluate_pairs{suffix}"]
        if inference == "cross":
            continue
        some = _first_users(test, 4000)
        projected = ranking.project(params, experiment.interactions, model=experiment.model)
        seconds = report.time(
            {
                "evaluate_users_loop": (
                    _loop_runner(experiment.model, projected, some),
                    len(some.users),
                ),
                "evaluate_users_vmap": (
                    lambda s=some, p=projected, m=experiment.model: ranking.rank_projected(m, p, s),
                    len(some.users),
                ),
            }
        )
        report.ratios["evaluate_loop_over_vmap"] = (
            seconds["evaluate_users_loop"] / seconds["evaluate_users_vmap"]
        )
        quarter = _first_users(test, len(test.users) // 4)
        memory = [
            ranking.ranker_memory(experiment.model, projected, users) for users in (quarter, test)
        ]
        report.ratios["evaluate_memory_x4"] = memory[1] / memory[0]
        few = _first_users(test, 256)
        touched = touched_items(dataset)
        full = len(few.users) * dataset.target.num_items
        seconds = report.time(
            {
                "full_ranking_pairs": (
                    lambda t=experiment, p=params, f=few, all_=touched: full_ranking.rank_full(
                        t.model, p, t.interactions, f, all_
                    ),
                    full,
                )
            }
        )
        report.rates["full_ranking_pairs_per_second"] = 1 / seconds["full_ranking_pairs"]


def _first_users(held_out: HeldOut, count: int) -> HeldOut:
    return HeldOut(*(x[:count] for x in held_out))


def _loop_runner(model: Model, projected: Any, held_out: HeldOut) -> Callable[[], None]:
    """One jitted call a user, candidates from the host, the rank read back before the next."""

    @jax.jit
    def rank(projected: Any, user: jax.Array, items: jax.Array, mask: jax.Array) -> Any:
        scores = model.scores(projected, user[None], items[None])
        return ranking.count_above(scores[0], mask)

    listed = np.concatenate([held_out.items[:, None], held_out.candidates], axis=1)

    def once() -> None:
        for user, items, mask in zip(held_out.users, listed, held_out.mask, strict=True):
            jax.device_get(rank(projected, user, items, mask))

    return once
