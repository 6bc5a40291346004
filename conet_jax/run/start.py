"""What a run starts from: drawn parameters, or a warm start."""

import jax
import numpy as np

from conet_jax import devices, models
from conet_jax.models import ials, out_of_fold
from conet_jax.models.base import Params, Sizes
from conet_jax.run.epoch import run_epoch
from conet_jax.run.experiment import Experiment, State, interactions_on, plan_of
from conet_jax.train.state import init_params


def initial_state(experiment: Experiment) -> State:
    """Returns the state before the first step, from the config's seed."""
    return experiment.state_of(_params(experiment))


def _params(experiment: Experiment) -> Params:
    """The parameters of ``Model.init``, or of a warm start."""
    config = experiment.config
    key = jax.random.fold_in(experiment.key, 0)
    params = init_params(experiment.model, key, experiment.sizes, experiment.mesh)
    if config.warm_start in ("ials", "crossfit"):
        joined = config.joined or "source" in experiment.model.domains
        options = models.options(ials, config)._replace(joined=joined)
        interactions = interactions_on(experiment.dataset, devices.one_device())
        given = (interactions, experiment.sizes, options)
        common = {"sweeps": config.ials_sweeps, "seed": config.seed}
        if config.warm_start == "ials":
            fitted = ials.fit(*given, **common)
        else:
            fitted = out_of_fold.fit(
                *given,
                **common,
                folds=config.folds,
                fold_sweeps=config.fold_sweeps,
                by_domain="source" in experiment.model.domains,
            )
        tables = {
            name: devices.spread(
                np.asarray(fitted[name], like.dtype), experiment.mesh, experiment.model.copies
            )
            for name, like in params.tables.items()
        }
        params = params._replace(tables=tables)
    if config.warm_start == "pretrain":
        tables = {**params.tables, "user": _pretrain(experiment)}
        params = params._replace(tables=tables)
    return params


def _pretrain(experiment: Experiment) -> jax.Array:
    """User embeddings of an MLP trained on the source domain (footnote 10)."""
    config, data = experiment.config, {"target": experiment.interactions["source"]}
    mlp = models.MODELS["mlp"]
    model = mlp.build(models.options(mlp, config))
    sizes = Sizes(experiment.sizes.users, experiment.sizes.source_items, 0)
    params = init_params(model, jax.random.fold_in(experiment.key, 2), sizes, experiment.mesh)
    alone = experiment._replace(
        model=model,
        interactions=data,
        plan=plan_of(config, model, data),
        key=jax.random.fold_in(experiment.key, 3),
    )
    state = alone.state_of(params)
    for epoch in range(1, config.pretrain_epochs + 1):
        state, _ = run_epoch(alone, state, epoch)
    return alone.params(state).tables["user"]
