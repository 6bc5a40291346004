"""Lists: the whole catalogue for a block of users after another, and for one user."""

from benchmarks import data
from benchmarks.report import Report
from conet_jax.run.experiment import make_experiment
from conet_jax.serve import recommend
from conet_jax.train.state import init_params


def measure(report: Report, scale: str) -> None:
    """Times lists, tables projected."""
    dataset = data.dataset(scale)
    experiment = make_experiment(data.recipe_of_amazon(), dataset)
    # What the tables hold does not matter, and to fit them takes long.
    params = init_params(experiment.model, experiment.key, experiment.sizes, experiment.mesh)
    recommender = recommend.prepare(experiment, params)
    users = recommend.find_users(recommender, dataset.user_ids[:256])

    def several() -> None:
        for _ in recommend.stream(recommender, users):
            pass

    seconds = report.time(
        {
            "recommend_users": (several, len(users)),
            "recommend_one_user": (lambda: recommend.recommend(recommender, users[:1]), 1),
        }
    )
    report.rates["recommend_users_per_second"] = 1 / seconds["recommend_users"]
    report.rates["recommend_one_user_ms"] = 1e3 * seconds["recommend_one_user"]
