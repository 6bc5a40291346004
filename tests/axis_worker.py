"""What tests/test_parallel.py starts: some steps, or runs, on several numbers of devices.

Usage: python tests/axis_worker.py OUT JSON, with the fields of ``main`` as JSON.
"""

import json
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from helpers import MEDIUM

from benchmarks.traffic import collectives, compile_steps, traffic
from conet_jax import devices as devices_lib
from conet_jax import models
from conet_jax.config import default_config
from conet_jax.data import synthetic
from conet_jax.data.load import touched_items
from conet_jax.data.types import UserItems
from conet_jax.devices import rows as rows_lib
from conet_jax.models import ials
from conet_jax.run import memory, tune
from conet_jax.run.experiment import fit_pairs, make_experiment, sizes_of
from conet_jax.run.fit import fit
from conet_jax.run.start import initial_state
from conet_jax.train import full_ranking, ranking
from conet_jax.train.chunk import diagnose, train_chunk


def config_of(devices, variant="lasso", **fields):
    config = default_config(variant)
    config.ials_trials = 0
    config.update(
        name="tiny", layers=(16, 8, 4), cross_layers=min(2, config.cross_layers), batch_size=32,
        negatives=1, learning_rate=0.01, l1=1e-4, folds=3, ials_sweeps=2, fold_sweeps=1,
    )  # fmt: skip
    config.update({"devices": devices, "patience": 99, **fields})
    return config


def large_batches(devices, dataset, fields):
    """What a step of 1,024 examples a domain moves and holds, from the compiled program."""
    experiment = make_experiment(config_of(devices, batch_size=512, **fields), dataset)
    compiled = compile_steps(experiment, initial_state(experiment), 1)
    found = compiled.memory_analysis()
    params = jax.eval_shape(experiment.params, experiment.abstract_state())
    settled = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)) // devices
    return traffic(experiment, compiled) | {
        "announced": memory.memory(experiment, 1),
        "held": found.argument_size_in_bytes + found.temp_size_in_bytes + 2 * settled,
    }


def steps(dataset, devices, epochs, full, room, fields):
    """Trains some epochs: losses, settled tables in the order of ids, ranks, memory."""
    experiment = make_experiment(config_of(devices, **fields), dataset)
    if room is not None:  # less room than rows need: the way for the worst case is taken
        devices_lib.capacity = rows_lib.capacity = lambda count, n=None: room
    state, losses = initial_state(experiment), []
    whole = sum(x.nbytes for x in state.tables.values())
    shards = [s for x in state.tables.values() for s in x.addressable_shards]
    held = [
        sum(s.data.nbytes for s in shards if s.device == d) for d in experiment.mesh.devices.flat
    ]
    for epoch in range(epochs):
        state, sums = train_chunk(
            state,
            experiment.interactions,
            experiment.sampling_key,
            np.int32(epoch),
            np.int32(0),
            experiment.hyper,
            model=experiment.model,
            plan=experiment.plan,
            settings=experiment.settings,
            num_steps=experiment.plan.steps,
        )
        losses.append(np.asarray(sums["target_loss"]))
    params = experiment.params(state)
    ranks = ranking.rank_held_out(experiment.model, params, experiment.interactions, dataset.valid)
    out = {
        "losses": np.concatenate(losses),
        "above": ranks.above,
        "ndcg": ranking.summarize(ranks, k=10)["ndcg@10"],
        "held": max(held) / whole,
    }
    for name, table in experiment.to_save(params).tables.items():
        rows = experiment.abstract_state().tables[name].shape[0]
        out[f"table_{name}"] = np.asarray(table)[:rows]
    if full:
        arguments = params, experiment.interactions, experiment.sampling_key, np.int32(0)
        found = diagnose(*arguments, model=experiment.model, plan=experiment.plan)
        out["diagnostics"] = np.array([float(v) for _, v in sorted(found.items())])
        touched = touched_items(dataset)
        found = full_ranking.rank_full(
            experiment.model, params, experiment.interactions, dataset.valid, touched, block=64
        )
        out |= {"full_above": found.above, "full_candidates": found.candidates}
        trained = experiment.trained_items()
        found = full_ranking.best_items(
            *(experiment.model, params, experiment.interactions),
            *(dataset.valid.users, touched, trained),
            k=5,
            block=64,
        )
        out["best_items"] = found
    return out


def start(dataset, devices, fields):
    """What the search of the constants finds, and what a half sweep holds and moves."""
    ials._PAIRS_AT_ONCE = ials._PAIRS_SENT = 64  # a block has fewer rows than the tables
    config = config_of(devices, **fields)
    mesh = devices_lib.mesh(devices)
    found = tune.search(config, dataset, fit_pairs(dataset), mesh)
    options, sizes = models.factorisation(config), sizes_of(dataset)
    pairs = ials.matrix(fit_pairs(dataset), sizes, joined=options.joined, mesh=mesh)
    tables = ials.drawn(jax.random.key(0), sizes, options, mesh)
    x, y = (tables["user"],), pairs.items(tables)
    given = [1.0], pairs.weights(options), 1.0, 1.0, 3, -1, 1
    half = ials._improve.lower(x, y, pairs.by_user, *given, mesh=mesh).compile()
    held = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((tables, pairs[:2]))]
    return {
        "found": np.array([*found.constants.values(), found.ndcg]),
        "holds": sum(held),
        "usual": json.dumps(collectives(half.as_text())[1]),
        "block": ials._CHUNK * pairs.by_user.owners.shape[1],
        "items": sum(map(len, y)),
    }


def main(
    out,
    *,
    devices,
    x64=True,
    epochs=1,
    full=False,
    traffic=0,
    room=None,
    fields=None,
    runs=(),
    weights=False,
    seen=False,
    search=False,
):
    """Trains for each number of devices, or, with ``runs``, fits (workdir, devices, epochs).

    ``full`` has diagnostics and ranks all items, too; ``traffic`` is a number of devices; with
    ``weights`` the pairs have some, with ``seen`` there are pairs below the threshold, and
    ``search`` looks at the start of a recipe.
    """
    jax.config.update("jax_enable_x64", x64)
    dataset = synthetic.dataset(**MEDIUM)[0]
    if weights:
        for domain in ("target", "source"):
            rows = getattr(dataset, domain)
            own = 1 + np.arange(len(rows.indices), dtype=np.float32) % 7
            dataset = dataset._replace(**{domain: rows._replace(weights=own)})
    if seen:
        indptr = np.arange(dataset.num_users + 1, dtype=np.int32) * 5
        other = np.tile(np.arange(0, 200, 40, dtype=np.int32), dataset.num_users)
        dataset = dataset._replace(seen=UserItems(indptr, other, dataset.target.num_items))
    for workdir, count, until in runs:
        config = config_of(count, epochs=until, **(fields or {}))
        fit(config, workdir, dataset=dataset, quiet=True)
    results = {}
    if traffic:
        results["traffic"] = json.dumps(large_batches(traffic, dataset, fields or {}))
    for n in devices:
        if search:
            found = start(dataset, n, fields or {})
        else:
            found = steps(dataset, n, epochs, full, room, fields or {})
        for name, value in found.items():
            results[f"{name}/{n}"] = value
    np.savez(out, **results)
    assert jnp.zeros(()).dtype == (jnp.float64 if x64 else jnp.float32)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), **json.loads(sys.argv[2]))
