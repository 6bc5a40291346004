"""Towers in bfloat16, what a run says that it takes, and where compiled programs are kept."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, SMALL, tiny

from conet_jax.config import default_config, differences, validate
from conet_jax.data import synthetic
from conet_jax.errors import InputError
from conet_jax.run import memory
from conet_jax.run.epoch import CHUNK_STEPS
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.train import ranking
from conet_jax.train.chunk import chunk_lengths, chunk_program, run_steps
from conet_jax.train.step import joint_objective


@pytest.fixture(scope="module")
def data():
    return synthetic.dataset(**SMALL)[0]


def experiment_of(data, variant="lasso", **fields):
    return make_experiment(tiny(variant, **{"layers": (8, 4)} | fields), data)


def products(jaxpr):
    """Types of the arguments of every matrix product, those of inner programs too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(tuple(str(x.aval.dtype) for x in equation.invars))
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                found += products(inner) if hasattr(inner, "eqns") else []
    return found


def step_of(experiment):
    zero = jnp.int32(0)
    static = dict(
        model=experiment.model, plan=experiment.plan, settings=experiment.settings, num_steps=1
    )
    return initial_state(experiment), lambda state: run_steps(
        state,
        experiment.interactions,
        experiment.sampling_key,
        zero,
        zero,
        experiment.hyper,
        **static,
    )


@pytest.mark.parametrize("variant", ["conet", "mlp", "cross_stitch"])
def test_bfloat16_is_of_the_hidden_products_and_nothing_that_is_kept(data, variant):
    fields = dict(layers=(8, 8)) if variant == "cross_stitch" else {}
    types = {}
    for dtype in ("float32", "bfloat16"):
        experiment = experiment_of(data, variant, dtype=dtype, **fields)
        state, step = step_of(experiment)
        types[dtype] = products(jax.make_jaxpr(step)(state).jaxpr)
        after = jax.eval_shape(step, state)
        assert {str(x.dtype) for x in jax.tree.leaves(after)} == {"float32", "int32"}
    assert not any("bfloat16" in pair for pair in types["float32"])
    hidden = [pair for pair in types["bfloat16"] if "bfloat16" in pair]
    # Forward, and backward to the weights and to the inputs; the output stays in float32.
    assert hidden.count(("bfloat16", "bfloat16")) == len(hidden) >= 3
    assert ("float32", "float32") in types["bfloat16"]


@pytest.mark.parametrize("inference", ["target", "cross"])
def test_bfloat16_is_float32_to_eight_bits_in_loss_and_scores(data, inference):
    logits, losses = {}, {}
    for dtype in ("float32", "bfloat16"):
        experiment = experiment_of(data, "conet", dtype=dtype, inference=inference)
        params = jax.jit(experiment.model.init, static_argnums=1)(
            jax.random.key(0), experiment.sizes
        )
        # Of the size that training gives them: at the start all scores are nearly equal.
        params = params._replace(tables={name: 30 * x for name, x in params.tables.items()})
        projected = ranking.project(params, experiment.interactions, model=experiment.model)
        users = np.arange(20, dtype=np.int32)
        items = np.broadcast_to(np.arange(100, dtype=np.int32), (20, 100))
        logits[dtype] = np.asarray(jax.jit(experiment.model.scores)(projected, users, items))
        batch, ids = memory._step(experiment)
        rows = {name: params.tables[name][own] for name, own in ids.items()}
        value, _ = jax.jit(joint_objective, static_argnums=0)(
            experiment.model, params.dense, rows, batch, experiment.hyper
        )
        losses[dtype] = float(value)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-2)
    spread = np.ptp(logits["float32"])
    error = np.abs(logits["bfloat16"] - logits["float32"]).max()
    assert 0 < error < 2**-6 * spread
    # Logits of eight bits would tie: 128 values between two powers of two.
    distinct = {dtype: len(np.unique(values)) for dtype, values in logits.items()}
    assert distinct["bfloat16"] > 0.9 * distinct["float32"] > 1000


def test_bfloat16_without_towers_is_refused():
    config = default_config("cmf")
    config.dtype = "bfloat16"
    with pytest.raises(InputError, match=r"config\.dtype is 'bfloat16'.*no towers"):
        validate(config)


def test_a_stored_config_differs_in_dtype_and_one_of_version_0_1_is_refused():
    stored = json.loads(default_config().to_json())
    config = default_config()
    assert not differences(stored, config)
    config.dtype = "bfloat16"
    assert differences(stored, config) == ["config.dtype is 'float32' there and 'bfloat16' here"]
    with pytest.raises(ValueError, match=r"of version 0\.1, whose models have other parameters"):
        differences(stored | {"warm_start": ""}, config)


@pytest.mark.parametrize("variant", ["conet", pytest.param("recipe", marks=pytest.mark.slow)])
def test_memory_that_is_announced_is_that_of_the_compiled_program_within_a_half(variant):
    data = synthetic.dataset(
        num_users=600,
        num_target_items=500,
        num_source_items=400,
        target_interactions=6_000,
        source_interactions=9_000,
        seed=0,
    )[0]
    experiment = experiment_of(data, variant)
    steps = max(chunk_lengths(experiment.plan.steps, CHUNK_STEPS))
    step = jnp.int32(0)
    compiled = chunk_program.lower(
        experiment.abstract_state(),
        experiment.interactions,
        experiment.sampling_key,
        step,
        step,
        experiment.hyper,
        model=experiment.model,
        plan=experiment.plan,
        settings=experiment.settings,
        num_steps=steps,
        mesh=experiment.mesh,
    ).compile()
    found = compiled.memory_analysis()
    program = found.argument_size_in_bytes + found.temp_size_in_bytes
    params = memory._bytes(jax.eval_shape(experiment.params, experiment.abstract_state()))
    announced = memory.memory(experiment, CHUNK_STEPS)
    assert announced == pytest.approx(program + 2 * params, rel=0.5)


def test_run_begins_with_device_precision_parameters_and_memory(data):
    line = memory.line(experiment_of(data, "mlp", dtype="bfloat16"), 512)
    tower = 8 * 4 + 4 + 4 + 1
    device = f"cpu ({jax.devices()[0].device_kind})"
    assert line.startswith(f"{device}, towers in bfloat16, {190 * 4 + tower:,} parameters, about ")
    assert line.endswith(" MiB of arrays")


def cache_of(environment, before=""):
    code = f"{before}from conet_jax import cli; cli.cache_programs(); import jax; print(" + (
        "jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache)"
    )
    kept = {name: x for name, x in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
    )
    return done.stdout.split()


def test_compiled_programs_are_kept_where_the_environment_says(tmp_path):
    folder, enabled = cache_of({"XDG_CACHE_HOME": str(tmp_path)})
    assert folder.startswith(str(tmp_path / "conet_jax") + "/") and enabled == "True"
    # A program of one core uses one, wherever it is loaded: with two it would be half as fast.
    one_core = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    alone, _ = cache_of({"XDG_CACHE_HOME": str(tmp_path)}, one_core)
    assert (folder.endswith("-1") or folder != alone) and alone.endswith("-1")
    elsewhere = str(tmp_path / "elsewhere")
    assert cache_of({"JAX_COMPILATION_CACHE_DIR": elsewhere})[0] == elsewhere
    assert cache_of({"JAX_ENABLE_COMPILATION_CACHE": "0"})[1] == "False"
    (tmp_path / "file").touch()
    assert cache_of({"XDG_CACHE_HOME": str(tmp_path / "file")})[0] == "None"


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_help_loads_no_jax(name):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{name}', '--help']\n"
        "try:\n"
        f"    runpy.run_path(r'{ROOT / 'launch' / name}.py', run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'jax', 'orbax', 'polars', 'rich', 'flax'}, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--workdir" in done.stdout
