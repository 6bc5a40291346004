"""Lists: every item scored for a block of users after another, and for one user.

The recipe is trained for a moment only, on factors of a few sweeps.
"""

import numpy as np

from benchmarks import data
from benchmarks.report import Report
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.serve import recommend
from conet_jax.train.chunk import train_chunk

USERS, STEPS = 512, 500


def measure(report: Report, scale: str) -> None:
    """Times lists of ten, tables projected."""
    recommender = _trained(scale)
    users = recommend.find_users(recommender, recommender.dataset.user_ids[:USERS])

    def blocks() -> None:
        for first in range(0, len(users), 64):
            recommend.recommend(recommender, users[first : first + 64])

    seconds = report.time(
        {
            "recommend_users": (blocks, len(users)),
            "recommend_one_user": (lambda: recommend.recommend(recommender, users[:1]), 1),
        }
    )
    report.rates["recommend_users_per_second"] = 1 / seconds["recommend_users"]
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
