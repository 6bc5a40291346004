"""Lists by a shortlist, by ranking everything, and for one user.

The recipe is trained for a moment only, on factors of a few sweeps.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import data
from benchmarks.report import Report
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.serve import recommend
from conet_jax.train.chunk import train_chunk

USERS, EXACTLY, STEPS = 4_096, 256, 500


def measure(report: Report, scale: str) -> None:
    """Times lists of ten by a shortlist and by ranking everything, tables projected."""
    exact = _trained(scale)
    began = time.perf_counter()
    short = recommend.with_shortlist(exact)
    report.rates["recommend_shortlist_seconds"] = time.perf_counter() - began
    if short.shortlist is not None:  # small data have none
        lengths = short.shortlist.lengths(np.arange(exact.dataset.num_users))
        report.rates["recommend_shortlist_items"] = float(lengths.mean())
    users = recommend.find_users(exact, exact.dataset.user_ids[:USERS])

    def lists(recommender: recommend.Recommender, count: int) -> Callable[[], Any]:
        return lambda: list(recommend.stream(recommender, users[:count]))

    seconds = report.time(
        {
            "recommend_users": (lists(short, len(users)), len(users)),
            "recommend_users_exactly": (lists(exact, EXACTLY), EXACTLY),
            "recommend_one_user": (lists(short, 1), 1),
        }
    )
    report.rates["recommend_users_per_second"] = 1 / seconds["recommend_users"]
    report.rates["recommend_users_per_second_exactly"] = 1 / seconds["recommend_users_exactly"]
    report.rates["recommend_one_user_ms"] = 1e3 * seconds["recommend_one_user"]


def shortlisted(scale: str) -> recommend.Recommender:
    """Returns the recipe, with a shortlist."""
    return recommend.with_shortlist(_trained(scale))


def _trained(scale: str) -> recommend.Recommender:
    config = data.recipe_of_amazon()
    # What the search finds at the paper's size.
    config.update(ials_regularization=6030.0, ials_alpha=1130.0, ials_source_weight=0.176)
    config.update(ials_trials=0, ials_sweeps=8, fold_sweeps=1, devices=1)
    experiment = make_experiment(config, data.dataset(scale))
    state, _ = train_chunk(
        initial_state(experiment),
        experiment.interactions,
        experiment.sampling_key,
        np.int32(0),
        np.int32(0),
        experiment.hyper,
        model=experiment.model,
        plan=experiment.plan,
        settings=experiment.settings,
        num_steps=min(STEPS, experiment.plan.steps),
    )
    return recommend.prepare(experiment, experiment.params(state))
