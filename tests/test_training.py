"""Training against plain dense Adam (optax) on the same batches, and what a run may depend on."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conet_jax.models import cmf, conet, mlp
from conet_jax.models.base import Hyper, Model, Params, Sizes
from conet_jax.train import sampling
from conet_jax.train.chunk import chunk_lengths, train_chunk, train_population
from conet_jax.train.interactions import to_device
from conet_jax.train.state import Settings, init_state, settle_in_place, settled

SIZES = Sizes(users=40, target_items=30, source_items=25)
LAYERS = (8, 6, 4)
EPOCHS = 4
KEY = jax.random.key(1)


def interactions_of(seed, num_items, interactions):
    rng = np.random.default_rng(seed)
    pairs = rng.choice(SIZES.users * num_items, interactions, replace=False)
    users, items = np.divmod(np.sort(pairs), num_items)
    indptr = np.searchsorted(users, np.arange(SIZES.users + 1))
    return to_device(indptr, items, num_items)


INTERACTIONS = {
    "target": interactions_of(0, SIZES.target_items, 90),
    "source": interactions_of(1, SIZES.source_items, 40),
}


class Run(NamedTuple):
    """What a compiled program of some steps depends on."""

    model: Model
    plan: sampling.Plan
    settings: Settings


def run_of(model="conet", *, surplus="repeat", settings=None, **options):
    """A tiny run; ``options`` are those of CoNet."""
    if model == "mlp":
        model = mlp.build(mlp.Options(layers=LAYERS))
    elif model == "cmf":
        model = cmf.build(cmf.Options(layers=LAYERS))
    else:
        model = conet.build(conet.Options(layers=LAYERS, cross_layers=2, **options))
    plan = sampling.plan_epoch(
        INTERACTIONS,
        domains=model.domains,
        pairing=model.pairing,
        batch_size=4,
        surplus=surplus,
    )
    return Run(model, plan, Settings(**settings or {}))


def hyper_of(*, l1=1e-3, learning_rate=0.01, l2=0.02):
    return Hyper(*map(jnp.asarray, (learning_rate, 0.6, l1, 0.0, l2)))


@partial(jax.jit, static_argnames="model")
def init_params(key, *, model):
    params = model.init(key, SIZES)
    # Embeddings large enough for the loss to fall within a few steps.
    return Params({name: 30 * t for name, t in params.tables.items()}, params.dense)


def state_of(run, seed=0):
    params = init_params(jax.random.key(seed), model=run.model)
    return init_state(run.model, params, run.settings)


def train(run, state, hyper, chunks, *, epoch=0, first=0, key=KEY):
    """Runs an epoch's steps in chunks; returns the state and the steps' sums, concatenated."""
    sums = []
    for length in chunks:
        state, chunk = train_chunk(
            state,
            INTERACTIONS,
            key,
            jnp.int32(epoch),
            jnp.int32(first),
            hyper,
            **run._asdict(),
            num_steps=length,
        )
        sums.append(chunk)
        first += length
    return state, jax.tree.map(lambda *x: np.concatenate(x), *sums)


def norm_clipped(grads, limit):
    """Each variable by itself: g * limit / max(norm(g), limit)."""
    return jax.tree.map(lambda g: g * (limit / jnp.maximum(jnp.sqrt(jnp.sum(g * g)), limit)), grads)


def crossing(dense):
    """The H^l, of whatever directions and skips."""
    return {name: part for name, part in dense.items() if name.startswith("H_")}


@partial(jax.jit, static_argnames="run")
def dense_adam(params, epochs, hyper, *, run):
    """optax.adam on every parameter, tables whole; (parameters after, losses of the steps).

    The objective of a step, from the losses of its examples and Eqs. 7 and 8: the weighted sum of
    the domains' sums, and the penalties against the mean loss per example.
    """
    adam = optax.adam(hyper.learning_rate)
    lasso = bool(crossing(params.dense))

    def step(carry, position):
        params, state = carry
        batch = sampling.sample_step(KEY, *position, INTERACTIONS, run.plan)
        counts = [getattr(batch, domain).weights.sum() for domain in run.model.domains]
        # Nothing is penalised in a step in which nothing crosses.
        longest = jnp.where(batch.cross == 1, jnp.max(jnp.stack(counts)), 0.0)

        def joint(params):
            rows = {n: params.tables[n][ids] for n, ids in run.model.lookups(batch).items()}
            each = run.model.losses(params.dense, rows, batch, hyper)
            loss = jnp.sum(batch.target.weights * each["target"])
            value = loss
            if "source" in each:
                source = jnp.sum(batch.source.weights * each["source"])
                value = hyper.target_weight * loss + (1 - hyper.target_weight) * source
            if run.model.penalties:  # of cmf, whose rows are read example by example
                for at, (domain, alpha) in enumerate(
                    (("target", hyper.target_weight), ("source", 1 - hyper.target_weight))
                ):
                    own = jnp.concatenate([rows["user"][at], rows[f"{domain}_item"]], axis=1)
                    norms = hyper.l2 / 2 * jnp.sum(own**2, axis=1)
                    value += alpha * jnp.sum(getattr(batch, domain).weights * norms)
            for h in jax.tree.leaves(crossing(params.dense)):
                value += longest * hyper.l2 / 2 * jnp.sum(h**2)
            return value, loss

        (_, loss), grads = jax.value_and_grad(joint, has_aux=True)(params)
        grads = jax.tree.map(lambda g: run.settings.loss_scale * g, grads)
        weight = longest * hyper.l1
        if lasso and run.settings.l1_method == "subgradient":
            signs = jax.tree.map(
                lambda g, h: g + weight * jnp.sign(h),
                crossing(grads.dense),
                crossing(params.dense),
            )
            grads = grads._replace(dense=grads.dense | signs)
        if run.settings.clip_norm:
            grads = norm_clipped(grads, run.settings.clip_norm)
        updates, state = adam.update(grads, state)
        params = optax.apply_updates(params, updates)
        if lasso and run.settings.l1_method == "proximal":
            adam_state = state[0]

            def shrink(h, v):
                root = jnp.sqrt(v / (1 - 0.999**adam_state.count))
                threshold = hyper.learning_rate * weight / (root + 1e-8)
                return jnp.sign(h) * jnp.maximum(abs(h) - threshold, 0.0)

            shrunk = jax.tree.map(shrink, crossing(params.dense), crossing(adam_state.nu.dense))
            params = params._replace(dense=params.dense | shrunk)
        return (params, state), loss

    grid = jnp.stack(jnp.meshgrid(epochs, jnp.arange(run.plan.steps), indexing="ij"), -1)
    carry = params, adam.init(params)
    (params, _), losses = jax.lax.scan(step, carry, grid.reshape(-1, 2))
    return params, losses


PROXIMAL = dict(l1_method="proximal")
RUNS = {
    "subgradient": run_of(),
    "proximal_skip_unequal": run_of(cross_skip=1, source_layers=(8, 5, 3), settings=PROXIMAL),
    "proximal_clip_alone": run_of(
        pairing="random",
        surplus="alone",
        settings=PROXIMAL | dict(clip_norm=0.5, loss_scale=2.0),
    ),
    "subgradient_clip_low_rank": run_of(
        pairing="random", cross_rank=2, settings=dict(clip_norm=0.05, loss_scale=3.0)
    ),
    "cmf": run_of("cmf"),
    "mlp": run_of("mlp"),
}


def quick(*names, of):
    """Parameters, all but the named ones slow: each is some programs to compile."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in of]


@pytest.fixture
def optimised():
    """Programs as users have them."""
    before = jax.config.jax_disable_most_optimizations
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # which know nothing of the setting
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.mark.parametrize("name", quick("subgradient", "proximal_clip_alone", of=RUNS))
def test_steps_are_those_of_dense_adam_on_all_parameters(name):
    run = RUNS[name]
    with jax.enable_x64(True):
        hyper = hyper_of()
        start = init_params(jax.random.key(0), model=run.model)
        expected, losses = dense_adam(start, jnp.arange(EPOCHS, dtype=jnp.int32), hyper, run=run)
        state, found, farthest = state_of(run), [], jax.tree.map(lambda _: 0.0, start)
        for epoch in range(EPOCHS):
            state, sums = train(run, state, hyper, [run.plan.steps], epoch=epoch)
            found.append(sums["target_loss"])
            farthest = jax.tree.map(
                lambda far, a, b: max(far, np.abs(a - b).max()),
                farthest,
                start,
                settled(state, hyper.learning_rate),
            )
        assert 50 <= state.step == EPOCHS * run.plan.steps
        params = settled(state, hyper.learning_rate)
        np.testing.assert_allclose(np.concatenate(found), losses, rtol=1e-9)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), params, expected
        )
        assert min(jax.tree.leaves(farthest)) > 1e-3  # all parts were trained


def dense_result(run, params, hyper):
    return dense_adam(params, jnp.arange(EPOCHS, dtype=jnp.int32), hyper, run=run)


@pytest.mark.slow
def test_steps_in_float32_are_those_of_dense_adam_loosely():
    run, hyper = RUNS["subgradient"], hyper_of()
    expected, losses = dense_result(run, init_params(jax.random.key(0), model=run.model), hyper)
    state, found = state_of(run), []
    for epoch in range(EPOCHS):
        state, sums = train(run, state, hyper, [run.plan.steps], epoch=epoch)
        found.append(sums["target_loss"])
    np.testing.assert_allclose(np.concatenate(found), losses, rtol=2e-3)
    params = settled(state, hyper.learning_rate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-3), params, expected)


def assert_bits_equal(one, other):
    def check(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))

    jax.tree.map(check, one, other)


def in_other_chunks(name):
    """Trains an epoch twice in a chunk and once in two: the same to the last bit."""
    run, hyper = RUNS[name], hyper_of()
    state, sums = train(run, state_of(run), hyper, [12])
    again, again_sums = train(run, state_of(run), hyper, [12])
    assert_bits_equal((state, sums), (again, again_sums))
    assert_bits_equal((state, sums), train(run, state_of(run), hyper, [7, 5]))


def test_an_epoch_in_other_chunks_is_the_same_to_the_last_bit():
    in_other_chunks("subgradient")


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", ["subgradient", "proximal_clip_alone"])
def test_an_epoch_in_other_chunks_is_the_same_to_the_last_bit_in_programs_of_users(name):
    in_other_chunks(name)


def test_settling_on_the_way_changes_nothing_but_rounding():
    run = RUNS["subgradient"]
    with jax.enable_x64(True):
        hyper = hyper_of()
        steps = [run.plan.steps]
        states = [train(run, state_of(run), hyper, steps)[0] for _ in range(2)]
        states[0] = settle_in_place(states[0], hyper.learning_rate)
        rows = [np.asarray(state.tables["source_item"])[:, :-1] for state in states]
        assert np.abs(rows[0] - rows[1]).max() > 1e-4  # some rows were behind
        params = []
        for state in states:
            state, _ = train(run, state, hyper, steps, epoch=1)
            params.append(settled(state, hyper.learning_rate))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11), *params)
        state = settle_in_place(state, hyper.learning_rate)
        for name, packed in state.tables.items():
            np.testing.assert_array_equal(packed[:, : LAYERS[0] // 2], params[1].tables[name])


@pytest.mark.parametrize("name", quick("subgradient", of=["subgradient", "proximal_skip_unequal"]))
def test_a_population_is_its_single_runs(name):
    run = RUNS[name]
    with jax.enable_x64(True):
        hypers = [
            Hyper(*map(jnp.asarray, values))
            for values in ((0.01, 0.6, 1e-3, 0.0), (0.003, 0.9, 0.0, 0.0), (0.02, 0.0, 0.1, 0.0))
        ]
        members = jax.tree.map(lambda *x: jnp.stack(x), *hypers)
        states = [state_of(run, seed) for seed in range(3)]
        keys = jax.random.split(jax.random.key(1), 3)
        together, sums = train_population(
            jax.tree.map(lambda *x: jnp.stack(x), *states),
            INTERACTIONS,
            keys,
            jnp.int32(0),
            jnp.int32(0),
            members,
            **run._asdict(),
            num_steps=run.plan.steps,
        )
        for i, (state, hyper) in enumerate(zip(states, hypers, strict=True)):
            alone, alone_sums = train(run, state, hyper, [run.plan.steps], key=keys[i])
            own = jax.tree.map(lambda x, i=i: x[i], (together, sums))
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
                own,
                (alone, alone_sums),
            )


GOLDEN = {  # f32, JAX 0.10.2 on a CPU
    "target_loss": [5.3948, 5.89255, 6.08178],
    "source_loss": [6.08089, 6.67757, 6.83791],
}
RENEW = (
    "A training step gives other losses than it used to. If that was meant (another "
    "initialisation, sampling, optimiser or version of JAX), replace GOLDEN in "
    "tests/test_training.py by {found} and say why in the commit; if not, it is a bug."
)


def test_golden_steps():
    run = RUNS["subgradient"]
    _, sums = train(run, state_of(run), hyper_of(), [12])
    found = {
        name: [round(float(x), 5) for x in sums[name][:3]]
        for name in ("target_loss", "source_loss")
    }
    for name, values in GOLDEN.items():
        assert found[name] == pytest.approx(values, rel=2e-5), RENEW.format(found=found)


def cross_entries(state):
    return np.concatenate([np.ravel(h) for h in jax.tree.leaves(crossing(state.dense))])


@pytest.mark.parametrize("method", quick("proximal", of=["subgradient", "proximal"]))
def test_large_l1_empties_the_cross_connections(method):
    run = run_of(settings=dict(l1_method=method))
    entries = {}
    for l1 in (0.0, 1.0):
        state = state_of(run)
        for epoch in range(EPOCHS):
            hyper = hyper_of(l1=l1, learning_rate=1e-3, l2=0.0)
            state, _ = train(run, state, hyper, [run.plan.steps], epoch=epoch)
        entries[l1] = cross_entries(state)
    assert np.abs(entries[1.0]).mean() < 0.1 * np.abs(entries[0.0]).mean()
    zeros = (entries[1.0] == 0).mean()
    assert zeros > 0.9 if method == "proximal" else zeros == 0
    assert (entries[0.0] != 0).all()


@pytest.mark.parametrize("steps", [1, 2, 7, 97, 512, 513, 1000, 1031, 5193])
@pytest.mark.parametrize("longest", [1, 2, 5, 512])
def test_chunks_make_up_the_epoch_in_at_most_two_lengths(steps, longest):
    lengths = chunk_lengths(steps, longest)
    assert sum(lengths) == steps
    assert all(1 <= length <= longest for length in lengths)
    assert len(set(lengths)) <= 2
