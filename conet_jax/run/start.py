"""What a run starts from: drawn parameters, a model's own start, or users of a pretrained MLP."""

from typing import Any

import jax

from conet_jax import devices, models
from conet_jax.models.base import Params, Sizes
from conet_jax.run.epoch import run_epoch
from conet_jax.run.experiment import Experiment, State, fit_pairs, plan_of
from conet_jax.train.state import init_params


def initial_state(experiment: Experiment) -> State:
    """Returns the state before the first step, from the config's seed."""
    key = jax.random.fold_in(experiment.key, 0)
    params = init_params(experiment.model, key, experiment.sizes, experiment.mesh)
    if experiment.earlier is not None:
        params = params._replace(
            dense=devices.put(experiment.earlier.dense, experiment.mesh, devices.SAME)
        )
    if experiment.model.start is not None:
        dtypes = {name: table.dtype for name, table in params.tables.items()}
        params = params._replace(tables={})  # they are as large as what replaces them
        params = params._replace(tables=_own_start(experiment, dtypes))
    elif experiment.earlier is not None:
        params = params._replace(tables=_taken_over(experiment, params))
    elif experiment.config.pretrain_epochs:
        params = params._replace(tables={**params.tables, "user": _pretrained_users(experiment)})
    return experiment.state_of(params)


def _own_start(experiment: Experiment, dtypes: dict[str, Any]) -> dict[str, jax.Array]:
    """The tables that the model itself fits, on its devices."""
    pairs = fit_pairs(experiment.dataset)
    known = experiment.earlier.tables if experiment.earlier is not None else {}
    given = pairs, experiment.sizes, experiment.config.seed, known, experiment.mesh
    fitted = experiment.model.start(*given)
    return {name: fitted.pop(name).astype(dtype) for name, dtype in dtypes.items()}


def _taken_over(experiment: Experiment, params: Params) -> dict[str, jax.Array]:
    """The drawn tables, with the rows that an earlier run knows."""
    plain = experiment.to_save(params).tables
    known = experiment.earlier.tables
    return {
        name: devices.spread(known[name].into(table[: len(table)]), experiment.mesh)
        for name, table in plain.items()
    }


def _pretrained_users(experiment: Experiment) -> jax.Array:
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
