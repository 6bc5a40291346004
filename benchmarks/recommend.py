"""Lists: every item scored for a block of users after another, shortlists, and one user.

The recipe is trained for a moment only, on factors of a few sweeps. How long a shortlist must be
hangs on the model: it is measured as in use, and said beside the rates.
"""

import time

import numpy as np

from benchmarks import data
from benchmarks.report import Report
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.serve import rank, recommend, shortlist
from conet_jax.train.chunk import train_chunk

USERS, STEPS = 512, 500


def measure(report: Report, scale: str) -> None:
    """Times lists of ten, tables projected."""
    recommender = _trained(scale)
    users = recommend.find_users(recommender, recommender.dataset.user_ids[:USERS])
    few = users[: USERS // 4]
    began = time.perf_counter()
    everyone = recommend.find_users(recommender, recommender.dataset.user_ids)
    items = np.flatnonzero(recommender.warm)
    short = rank.shortlist_for(recommender, everyone, items, 10, False)
    making = time.perf_counter() - began

    def blocks(users: list[recommend.User], short: shortlist.Shortlist | None) -> None:
        for first in range(0, len(users), 64):
            recommend.recommend(recommender, users[first : first + 64], short=short)

    seconds = report.time(
        {
            "recommend_users_exact": (lambda: blocks(few, None), len(few)),
            "recommend_users": (lambda: blocks(users, short), len(users)),
            "recommend_one_user": (lambda: recommend.recommend(recommender, users[:1]), 1),
        }
    )
    each, exact = seconds["recommend_users"], seconds["recommend_users_exact"]
    report.rates["recommend_users_per_second_exact"] = 1 / exact
    report.rates["recommend_users_per_second"] = 1 / each
    report.rates["recommend_all_users_per_second"] = len(everyone) / (making + len(everyone) * each)
    report.rates["recommend_shortlist_items"] = (
        0 if short is None else (short.groups * shortlist.GROUP)
    )
    report.rates["recommend_shortlist_seconds"] = making
    report.ratios["recommend_exact_over_shortlist"] = exact / each
    report.rates["recommend_one_user_ms"] = 1e3 * seconds["recommend_one_user"]


def _trained(scale: str) -> recommend.Recommender:
    config = data.recipe_of_amazon()
    config.update(ials_sweeps=6, folds=0, ials_regularization=5.0, ials_alpha=20.0, devices=1)
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
