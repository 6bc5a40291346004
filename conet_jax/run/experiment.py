"""An experiment: a config made concrete on a data set."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from conet_jax import config as config_lib
from conet_jax import devices, models
from conet_jax.data.load import check_users
from conet_jax.data.types import Dataset, HeldOut, trained_items
from conet_jax.errors import InputError
from conet_jax.models import ials
from conet_jax.models.base import FittedModel, Hyper, Model, Params, Sizes
from conet_jax.run import memory, tune
from conet_jax.run.checkpoints import Checkpoints
from conet_jax.train import sampling
from conet_jax.train.interactions import Interactions, relative, to_device
from conet_jax.train.state import Settings, TrainState, init_state, settled

ROLLBACK = 0.5  # factor on the learning rate of each, under config.on_nonfinite=rollback


State = TrainState | Params  # Params of a model that is not trained by gradients


class Experiment(NamedTuple):
    """A config made concrete on a data set: what every launcher needs to compute anything."""

    config: ConfigDict
    dataset: Dataset
    model: Model | FittedModel
    interactions: dict[str, Interactions]
    plan: sampling.Plan | None  # None for a model that is not trained by gradients
    settings: Settings
    hyper: Hyper
    key: jax.Array
    sweep: Callable[[Params], Params] | None  # an epoch of such a model
    mesh: jax.sharding.Mesh  # the devices, see ``devices``; one for such a model
    constants: dict[str, float] | None = None  # of a start that has tuned itself, as in ``config``
    earlier: Any = None  # an ``earlier.Earlier``, of a run that goes on with new data

    @property
    def sizes(self) -> Sizes:
        """Rows of the tables."""
        return sizes_of(self.dataset)

    def trained_items(self, domain: str = "target") -> np.ndarray:
        """Which items of a domain have a training pair, bool[items]."""
        return trained_items(getattr(self.dataset, domain))

    def abstract_state(self) -> State:
        """Returns shapes and dtypes of the state, computing nothing."""
        return jax.eval_shape(lambda: self.state_of(self.model.init(self.key, self.sizes)))

    def params(self, state: State) -> Params:
        """Returns a copy of the parameters, every row brought to the current step."""
        if self.sweep is not None:
            return state
        return settled(state, self.hyper.learning_rate)

    def to_save(self, state: State) -> State:
        """Returns a state or parameters as they are saved, whatever the number of devices."""
        copies = self.model.copies
        return _with_tables(state, devices.in_order(state.tables, mesh=self.mesh, copies=copies))

    def from_saved(self, saved: State) -> State:
        """Returns what ``to_save`` was given."""
        plain = self.abstract_state().tables
        num_rows = tuple((name, table.shape[0]) for name, table in plain.items())
        tables = devices.interleaved(
            saved.tables, num_rows=num_rows, mesh=self.mesh, copies=self.model.copies
        )
        return _with_tables(saved, tables)

    def saved_like(self, abstract: State) -> State:
        """Returns shapes, dtypes and devices of ``to_save`` of plain arrays."""
        like = devices.ordered_like(abstract, self.mesh, devices.SAME)
        tables = {
            name: devices.ordered_like(table, self.mesh, devices.SPLIT, self.model.copies(name))
            for name, table in abstract.tables.items()
        }
        return _with_tables(like, tables)

    def member(self, config: ConfigDict) -> "Experiment":
        """Returns this under a config that differs in fields of ``Hyper`` and seed alone."""
        config = tune.resolved(config, self.constants)
        return self._replace(config=config, hyper=hyper_of(config), key=jax.random.key(config.seed))

    def tuned(self, constants: dict[str, float]) -> "Experiment":
        """Returns this with the constants that ``tune.search`` has found for its config."""
        config = tune.resolved(self.config, constants)
        model = models.build(config)
        sweep = self.sweep and model.sweeper(self.interactions, self.sizes)
        return self._replace(config=config, model=model, sweep=sweep, constants=constants)

    def slower(self, rollbacks: int) -> "Experiment":
        """Returns this experiment with the learning rate in force after so many rollbacks."""
        if not rollbacks:
            return self
        rate = self.hyper.learning_rate * ROLLBACK**rollbacks
        return self._replace(hyper=self.hyper._replace(learning_rate=rate))

    def resumable(self, state: State) -> Any:
        """Returns what of the state a run must save to go on: nothing of a closed form."""
        return {"step": jnp.int32(1)} if self.model.closed_form else self.to_save(state)

    def resume(self, checkpoints: Checkpoints) -> tuple[State | None, dict[str, Any]]:
        """Returns the latest (state, progress); no state of a closed form, which is done."""
        if self.model.closed_form:
            return None, checkpoints.restore_latest(_CLOSED_FORM)[1]
        saved, progress = checkpoints.restore_latest(self.saved_like(self.abstract_state()))
        return self.from_saved(saved), progress

    def best(self, checkpoints: Checkpoints, epoch: int) -> Params:
        """Returns the parameters saved as best at ``epoch``."""
        abstract = jax.eval_shape(self.params, self.abstract_state())
        return self.from_saved(checkpoints.restore_best(epoch, self.saved_like(abstract)))

    def state_of(self, params: Params) -> State:
        """Returns the state before the first step from its parameters."""
        if self.sweep is not None:
            return params
        return init_state(self.model, params, self.settings)

    @property
    def sampling_key(self) -> jax.Array:
        """Key of everything random in training."""
        return jax.random.fold_in(self.key, 1)


_CLOSED_FORM = {"step": jax.ShapeDtypeStruct((), np.int32)}


def _with_tables(values: State, tables: dict[str, Any]) -> State:
    if isinstance(values, Params):
        return values._replace(tables=tables)
    return values.replace(tables=tables)


def make_experiment(config: ConfigDict, dataset: Dataset) -> Experiment:
    """``untuned``, and the start has tuned itself, if the config says so.

    Does not look at the test split: a search must do without it.

    Raises:
      InputError: see ``untuned``.
    """
    experiment = untuned(config, dataset)
    if not tune.is_due(config):
        return experiment
    found = tune.search(config, dataset, fit_pairs(dataset), experiment.mesh)
    return experiment.tuned(found.constants)


def untuned(config: ConfigDict, dataset: Dataset) -> Experiment:
    """Checks a config against a data set and builds model, interactions and plan, in a moment.

    Raises:
      InputError: the config is invalid, or the data set has no validation users.
    """
    config_lib.validate(config)
    check_users(dataset, "valid")
    memory.forget_programs()
    model = models.build(config)
    mesh = devices.mesh(config.devices)
    if isinstance(model, FittedModel) or model.graph is not None:
        if jax.process_count() > 1:
            raise InputError(
                f"config.model is {config.model!r}, which is fitted on one device: expected one "
                "process"
            )
        mesh = devices.one_device()
    avoid_seen = config.negatives_avoid_seen
    if avoid_seen and (dataset.seen is None or isinstance(model, FittedModel)):
        raise InputError(
            "config.negatives_avoid_seen is True, but "
            + (
                "the data have no target pairs below a threshold: leave it out"
                if dataset.seen is None
                else f"config.model={config.model} samples no negatives: leave it out"
            )
        )
    interactions = interactions_on(dataset, mesh, shared=model.shared_users, avoid_seen=avoid_seen)
    plan, sweep = None, None
    if isinstance(model, FittedModel):
        sweep = model.sweeper(interactions, sizes_of(dataset))
    else:
        try:
            plan = plan_of(config, model, interactions)
        except ValueError as error:
            raise InputError(str(error)) from None
    settings = Settings(config.l1_method, float(config.clip_norm), float(config.loss_scale))
    hyper, key = devices.put((hyper_of(config), jax.random.key(config.seed)), mesh, devices.SAME)
    return Experiment(config, dataset, model, interactions, plan, settings, hyper, key, sweep, mesh)


def check_cuts(config: ConfigDict, *parts: HeldOut) -> None:
    """Checks that a held-out item is ranked among more items than each of ``eval_k``.

    Raises:
      InputError: where it is among the first K whatever the model does.
    """
    listed = 1 + min(held_out.candidates.shape[1] for held_out in parts)
    if max(config.eval_k) >= listed:
        fitting = ",".join(str(k) for k in config.eval_k if k < listed)
        raise InputError(
            f"config.eval_k has {max(config.eval_k)}, but a held-out item is ranked among {listed}:"
            f" expected less; give --config.eval_k={fitting or listed // 2}, or prepare the data "
            "with more --candidates"
        )


def interactions_on(
    dataset: Dataset, mesh: jax.sharding.Mesh, *, shared: bool = False, avoid_seen: bool = False
) -> dict[str, Interactions]:
    """Puts the training interactions of both domains on devices.

    Args:
      dataset: the data.
      mesh: the devices.
      shared: leave out what users of one domain alone have.
      avoid_seen: sample none of the target items that a user has rated below the threshold.
    """
    given = {}
    for domain, pairs in (("target", dataset.target), ("source", dataset.source)):
        indptr = pairs.indptr
        if shared:  # users of both domains come first
            indptr = np.minimum(indptr, indptr[dataset.num_shared])
        items = pairs.indices[: indptr[-1]]
        weights = None if pairs.weights is None else pairs.weights[: indptr[-1]]
        avoided = None
        if avoid_seen and domain == "target":
            avoided = dataset.seen.indptr, dataset.seen.indices
        given[domain] = to_device(
            indptr, items, pairs.num_items, mesh, weights=weights, avoided=avoided
        )
    return given


def fit_pairs(dataset: Dataset) -> dict[str, ials.Pairs]:
    """Returns what a factorisation is fitted on, on the host: everybody's pairs by domain."""
    pairs = {}
    for domain, own in (("target", dataset.target), ("source", dataset.source)):
        users = np.repeat(np.arange(len(own.indptr) - 1, dtype=np.int32), np.diff(own.indptr))
        weighed = own.weights is not None and len(own.weights)
        weights = relative(own.weights) if weighed else None
        pairs[domain] = ials.Pairs(users, own.indices, weights)
    return pairs


def hyper_of(config: ConfigDict) -> Hyper:
    """Returns the real-valued hyper-parameters, traced."""
    return Hyper(*(jnp.asarray(float(config[name])) for name in Hyper._fields))


def sizes_of(dataset: Dataset) -> Sizes:
    """Returns the rows of the tables."""
    return Sizes(dataset.num_users, dataset.target.num_items, dataset.source.num_items)


def plan_of(config: ConfigDict, model: Model, interactions: dict[str, Any]) -> sampling.Plan:
    """Returns the layout of an epoch."""
    return sampling.plan_epoch(
        interactions,
        domains=model.domains,
        pairing=model.pairing,
        negatives=config.negatives,
        batch_size=config.batch_size,
        surplus=config.surplus,
        history_length=config.history_length,
        folds=model.folds,
    )


def for_inference(experiment: Experiment, params: Params) -> tuple[Experiment, Params]:
    """Returns the same model with a row a user or item: of factors, those of all pairs."""
    if not experiment.model.fixed_tables:
        return experiment, params
    config = experiment.config.copy_and_resolve_references()
    config.folds = 0
    tables = {
        name: table[experiment.model.copies(name) - 1 :: experiment.model.copies(name)]
        for name, table in params.tables.items()
    }
    experiment = experiment._replace(config=config, model=models.build(config))
    return experiment, params._replace(tables=tables)
