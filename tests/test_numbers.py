"""Numbers that are not finite end a run before they are saved; indices are checked on the host.

Losses and gradients are poisoned at one step, in the model; what the run does about it is compared
with what a run without poison does up to there.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny, without_seconds

from conet_jax import models
from conet_jax.config import default_config
from conet_jax.data import synthetic
from conet_jax.data.types import HeldOut
from conet_jax.errors import Diverged, InputError
from conet_jax.models import popularity
from conet_jax.models.base import Sizes
from conet_jax.run import loop
from conet_jax.run.checkpoints import Checkpoints
from conet_jax.run.epoch import run_epoch
from conet_jax.run.experiment import make_experiment
from conet_jax.run.fit import fit
from conet_jax.run.start import initial_state
from conet_jax.serve import recommend
from conet_jax.studies import runner, sweep
from conet_jax.train import full_ranking, ranking, sampling
from conet_jax.train.chunk import train_chunk
from conet_jax.train.interactions import to_device
from conet_jax.train.state import largest_parameter, not_finite, settle_in_place


@pytest.fixture(scope="module")
def data():
    return synthetic.dataset(
        num_users=60,
        num_target_items=130,
        num_source_items=130,
        target_interactions=400,
        source_interactions=500,
        seed=0,
    )[0]


def config_of(**fields):
    return tiny("conet", layers=(8, 4), batch_size=32, **fields)


def key_of(experiment, epoch, step):
    """The key of a step's batch, by which a poisoned loss knows it; from 0."""
    batch = sampling.sample_step(
        experiment.sampling_key,
        jnp.int32(epoch),
        jnp.int32(step),
        experiment.interactions,
        experiment.plan,
    )
    return jax.random.key_data(batch.key)


# What is poisoned, by the value of the hyper-parameter that this model does not read.
CLEAN, TARGET, SOURCE, TABLE, KERNEL, OVERFLOW = range(6)


def poisoned(model, key, code):
    """The model, but at the step of ``key`` something is not finite that ``code(hyper)`` names."""

    def losses(dense, rows, batch, hyper):
        here = jnp.where((jax.random.key_data(batch.key) == key).all(), code(hyper), CLEAN)

        def nothing_with_gradient(x, when):
            # 0, whose derivative is 0 or, at the step, inf * 0.
            return jnp.sqrt(jnp.where(here == when, 0.0, 1.0) + jnp.sum(0 * x)) - jnp.where(
                here == when, 0.0, 1.0
            )

        each = model.losses(dense, rows, batch, hyper)
        more = nothing_with_gradient(rows["source_item"], TABLE)
        more += nothing_with_gradient(dense["target"]["W_0"]["kernel"], KERNEL)
        more += jnp.where(here == OVERFLOW, 1e25, 0.0) * jnp.sum(rows["user"])
        each = each | {"target": each["target"] + more}
        return {
            domain: each[domain] + jnp.where(here == when, jnp.inf, 0.0)  # without a gradient
            for domain, when in (("target", TARGET), ("source", SOURCE))
        }

    return model._replace(losses=losses)


@pytest.fixture(scope="module")
def unwatched(data):
    """A run whose fourth step is poisoned by ``with_poison``."""
    clean = make_experiment(config_of(), data)
    key = key_of(clean, 0, 3)
    return clean._replace(model=poisoned(clean.model, key, lambda hyper: hyper.negative_weight))


@pytest.fixture(scope="module")
def experiment(unwatched):
    return unwatched._replace(settings=unwatched.settings._replace(watch=True))


def with_poison(experiment, code):
    return experiment._replace(hyper=experiment.hyper._replace(negative_weight=jnp.float32(code)))


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (TARGET, "the target loss is"),
        (SOURCE, "the source loss is"),
        (TABLE, r"the gradient of tables/source_item \(source\) is"),
        (KERNEL, r"the gradient of dense/target/W_0/kernel \(target\) is"),
        (OVERFLOW, r"the gradient of tables/user \(both domains\) is"),  # its square, in Adam
    ],
)
def test_step_domain_and_largest_parameter_are_named(experiment, code, what):
    message = what + r" not finite at step 4 \(epoch 1; the largest parameter is \w+/\w+"
    with pytest.raises(Diverged, match=message):
        run_epoch(with_poison(experiment, code), initial_state(experiment), 1)
    assert experiment.plan.steps > 4


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (TARGET, "the target loss is not finite at step 4 "),
        (SOURCE, "the source loss is not finite at step 4 "),
        (TABLE, "(loss|tables/source_item) is not finite at step"),  # once a row is read again
        (KERNEL, "the (target|source) loss is not finite at step 5 "),  # which reads it
        (OVERFLOW, "tables/user is not finite at step"),  # a moment
    ],
)
def test_without_watching_each_step_the_epoch_still_fails(unwatched, code, what):
    with pytest.raises(Diverged, match=what + ".*epoch 1; the largest parameter is"):
        next(loop.train(with_poison(unwatched, code), initial_state(unwatched)))


def test_watching_changes_no_bit_of_a_sound_epoch(unwatched, experiment):
    plain, _ = run_epoch(with_poison(unwatched, CLEAN), initial_state(unwatched), 1)
    watched, _ = run_epoch(with_poison(experiment, CLEAN), initial_state(experiment), 1)
    jax.tree.map(np.testing.assert_array_equal, plain, watched)


@pytest.mark.parametrize("code", [TARGET, SOURCE, TABLE, KERNEL, OVERFLOW])
def test_a_step_that_is_not_finite_is_not_taken(experiment, code):
    def train(code, steps):
        state = initial_state(experiment)
        for step in range(steps):  # one program
            state, _ = train_chunk(
                state,
                experiment.interactions,
                experiment.sampling_key,
                np.int32(0),
                np.int32(step),
                with_poison(experiment, code).hyper,
                model=experiment.model,
                plan=experiment.plan,
                settings=experiment.settings,
                num_steps=1,
            )
        return state

    stopped, before, after = train(code, 4), train(CLEAN, 3), train(CLEAN, 4)
    jax.tree.map(np.testing.assert_array_equal, stopped, before)
    assert int(stopped.step) == 3 and int(after.step) == 4


def test_largest_parameter_is_that_of_numpy_and_one_that_is_not_finite_comes_first(experiment):
    state = initial_state(experiment)
    params = experiment.params(state)
    entries = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.abs(leaf).max(initial=0)
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    name = max(entries, key=entries.get)
    for given in (state, params):
        assert largest_parameter(given) == (name, entries[name])
    for bad in (np.nan, np.inf, -np.inf):
        dense = jax.tree.map(jnp.copy, state.dense)
        dense["source"]["W_0"]["bias"] = dense["source"]["W_0"]["bias"].at[1].set(bad)
        found, entry = largest_parameter(state.replace(dense=dense))
        assert found == "dense/source/W_0/bias" and not np.isfinite(entry)


def test_moment_that_is_not_finite_is_found(experiment):
    state = initial_state(experiment)
    assert not_finite(state) is None
    packed = state.tables["source_item"]
    bad = packed.at[2, packed.shape[1] // 3 + 1].set(jnp.inf)
    tables = {**state.tables, "source_item": bad}
    assert not_finite(state.replace(tables=tables)) == "tables/source_item"
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.opt_state)
    assert not_finite(state.replace(opt_state=bad)).startswith("moments/")


def test_parameter_or_score_that_is_not_finite_stops_the_epoch(experiment):
    state = initial_state(experiment)
    row = {"epoch": 2, "step": 9, "train_loss": {"target": 0.5}, "seconds": {}}

    def end(name, value, factor=1.0):
        table = state.tables[name]
        bad = state.replace(
            tables={**state.tables, name: table.at[3].set(value)},
            dense=jax.tree.map(lambda x: factor * x, state.dense),
        )
        loop.end_epoch(experiment, bad, dict(row), loop.Progress(), 0.0)

    with pytest.raises(Diverged, match=r"tables/user is not finite at step 9 \(epoch 2; the larg"):
        end("user", np.nan)
    # Finite, and its square would do; the scores overflow.
    with pytest.raises(Diverged, match=r"a NaN or infinite score .* at step 9 \(epoch 2; the larg"):
        end("target_item", 1e30, factor=1e10)


# Going back.


@pytest.fixture
def diverging(data, monkeypatch):
    """Every run diverges at the second step of epoch 2 unless the learning rate is below 3e-4."""
    key = key_of(make_experiment(config_of(), data), 1, 1)
    build = models.build

    def code(hyper):
        return jnp.where(hyper.learning_rate < 3e-4, CLEAN, TARGET)

    kept = {}  # an equal model is the same program

    def built(config):
        return kept.setdefault(str(config.layers), poisoned(build(config), key, code))

    monkeypatch.setattr(models, "build", built)


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_rollback_goes_on_from_the_checkpoint_at_a_smaller_rate(diverging, data, tmp_path):
    with pytest.raises(Diverged, match="target loss is not finite at step"):
        fit(config_of(), tmp_path / "run", dataset=data)
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == [1]
    # The message's advice: the same command, and this.
    config = config_of(on_nonfinite="rollback")
    result = fit(config, tmp_path / "run", dataset=data)
    assert result["rollbacks"] == 2 and result["epochs"] == 3
    rows = rows_of(tmp_path / "run")
    assert [row.get("rollbacks") and len(row["rollbacks"]) for row in rows] == [None, 2, None]
    back = rows[1]["rollbacks"]
    assert [entry["learning_rate"] for entry in back] == [5e-4, 2.5e-4]
    steps = rows[0]["step"]
    for entry in back:
        assert f"the target loss is not finite at step {steps + 2} (epoch 2" in entry["reason"]
    # The same by hand: an epoch at the rate given, the others at a quarter of it.
    experiment = make_experiment(config, data)
    first = next(loop.train(experiment, initial_state(experiment)))
    state = settle_in_place(first.state, experiment.hyper.learning_rate)
    quarter = experiment._replace(
        hyper=experiment.hyper._replace(learning_rate=experiment.hyper.learning_rate / 4)
    )
    later = [end.row for end in loop.train(quarter, state, first.progress)]
    for found, row in zip(rows, [first.row, *later], strict=True):
        found.pop("rollbacks", None)
        assert without_seconds(found) == without_seconds(json.loads(json.dumps(row)))


@pytest.mark.parametrize("epoch", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_run_killed_around_a_rollback_ends_the_same(diverging, data, tmp_path, monkeypatch, epoch):
    config = config_of(on_nonfinite="rollback")
    whole = fit(config, tmp_path / "whole", dataset=data)

    class Crash(Exception):
        pass

    save = Checkpoints.save_latest

    def crash(self, at, state, progress):
        if at == epoch:
            raise Crash
        save(self, at, state, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save_latest", crash)
        with pytest.raises(Crash):
            fit(config, tmp_path / "run", dataset=data)
    again = fit(config, tmp_path / "run", dataset=data)
    assert without_seconds(again) == without_seconds(whole)
    both = [list(map(without_seconds, rows_of(tmp_path / name))) for name in ("run", "whole")]
    assert both[0] == both[1]


def test_rollbacks_end_and_nothing_bad_is_saved(data, tmp_path):
    config = config_of(on_nonfinite="rollback", learning_rate=1e30)
    with pytest.raises(Diverged, match="not finite at step .* after 5 rollbacks: start anew"):
        fit(config, tmp_path / "run", dataset=data)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.latest_epoch() is None
    checkpoints.close()
    assert rows_of(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_the_command_names_step_domain_and_parameter_on_any_number_of_devices(tmp_path, devices):
    root = Path(__file__).resolve().parent.parent
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [
            *(sys.executable, str(root / "launch" / "train.py")),
            f"--config={root / 'configs' / 'demo.py'}:conet",
            *("--config.learning_rate=1e30", "--config.on_nonfinite=rollback"),
            *("--config.data.synthetic.num_users=200", "--config.layers=(16,8)"),
            *("--config.data.synthetic.target_interactions=1500", "--config.cross_layers=1"),
            *("--config.data.synthetic.source_interactions=1500", f"--workdir={tmp_path / 'run'}"),
            *(f"--config.devices={devices}",),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags},
        timeout=900,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: the "), line
    for fragment in (
        r"(loss|gradient of \S+ \(\w+( domains)?\)) is not finite at step \d+ \(epoch",
        r"the largest parameter is \w+/\S+, with an entry of \d",
        "and nothing of this epoch was saved, after 5 rollbacks: start anew",
    ):
        assert re.search(fragment, line), line
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert not any((tmp_path / "run" / "checkpoints" / "latest").glob("[0-9]*"))


def test_rollback_in_a_sweep_is_refused(data, tmp_path):
    for value, problem in (("rollback", "expected stop in a sweep"), ("stop", "")):
        config = config_of(on_nonfinite=value)
        planned = sweep.entries(
            sweep.Sweep("", config, {}, tmp_path, points=[{}]), runner.Datasets(data)
        )
        assert problem in planned[0].problem and bool(planned[0].problem) == bool(problem)


# Indices.


SCORES = popularity.build(popularity.Options())


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("users", 3, "user 3 is out of range: expected 0 to 2"),
        ("users", -1, "user -1 is out of range"),
        ("items", 9, "held-out item 9 is out of range: expected 0 to 8"),
        ("candidates", 9, "candidate 9 is out of range: expected 0 to 8"),
        ("candidates", -2, "candidate -2 is out of range"),
    ],
)
def test_ranker_refuses_rows_out_of_range(part, value, message):
    interactions = {"target": to_device(np.array([0, 1, 1, 2]), np.array([4, 5]), 9)}
    params = SCORES.init(jax.random.key(0), Sizes(3, 9, 0))
    held_out = HeldOut(
        np.array([0, 1]), np.array([1, 2]), np.array([[3, 4], [5, 6]]), np.ones((2, 2), bool)
    )
    assert ranking.rank_held_out(SCORES, params, interactions, held_out).tied.shape == (2,)
    values = np.array(getattr(held_out, part))
    values.flat[-1] = value
    bad = held_out._replace(**{part: values})
    with pytest.raises(InputError, match=message):
        ranking.rank_held_out(SCORES, params, interactions, bad)
    if part != "candidates":
        with pytest.raises(InputError, match=message):
            touched = np.array([0, 0, 0, 0]), np.array([], int)
            full_ranking.rank_full(SCORES, params, interactions, bad, touched)


def test_full_ranker_refuses_touched_items_out_of_range():
    interactions = {"target": to_device(np.array([0, 1]), np.array([4]), 9)}
    params = SCORES.init(jax.random.key(0), Sizes(1, 9, 0))
    held_out = HeldOut(np.array([0]), np.array([1]), np.zeros((1, 0), int), np.ones((1, 0), bool))
    touched = np.array([0, 1]), np.array([9])
    with pytest.raises(InputError, match="touched item 9 is out of range: expected 0 to 8"):
        full_ranking.rank_full(SCORES, params, interactions, held_out, touched)


@pytest.mark.parametrize(
    ("user", "items", "message"),
    [
        (recommend.User("a", row=60), None, "user 'a': row 60 is out of range: expected 0 to 59"),
        (recommend.User("a", row=-1), None, "user 'a': row -1 is out of range"),
        (
            recommend.User("b", source=np.array([3, 130])),
            None,
            "user 'b': source item 130 is out of range: expected 0 to 129",
        ),
        (recommend.User("c", row=0), [0, 130], "item 130 is out of range: expected 0 to 129"),
        (recommend.User("c", row=0), [-1, 4], "item -1 is out of range"),
    ],
)
def test_recommender_refuses_rows_out_of_range(data, user, items, message):
    experiment = make_experiment(default_config("popularity"), data)
    recommender = recommend.prepare(experiment, experiment.sweep(initial_state(experiment)))
    known = recommend.User("known", row=3)
    assert len(recommend.recommend(recommender, [known], k=2)) == 2
    items = None if items is None else np.array(items)
    with pytest.raises(InputError, match=message):
        recommend.recommend(recommender, [known, user], k=2, items=items)
