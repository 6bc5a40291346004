"""What ``launch/benchmark.py`` times: the claims of the README, as ratios within one run."""

import math
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from conet_jax import devices
from conet_jax.config import default_config
from conet_jax.data import synthetic
from conet_jax.data.load import touched_items
from conet_jax.data.types import Dataset, HeldOut
from conet_jax.models.base import Model, Params
from conet_jax.run.epoch import CHUNK_STEPS
from conet_jax.run.experiment import Experiment, interactions_on, make_experiment
from conet_jax.run.fit import fit, versions
from conet_jax.run.start import initial_state
from conet_jax.serve import recommend
from conet_jax.train import ranking, sampling
from conet_jax.train.chunk import chunk_program, run_steps, train_chunk, train_population
from conet_jax.train.state import (
    SETTLE_STEP,
    TrainState,
    init_params,
    init_state,
    settle_in_place,
    settled,
)
from conet_jax.train.step import plan_rows, train_step, wanted_rows

# Table 1: users, target items and interactions, source items and interactions.
SCALES = {
    "amazon": (80_763, 93_799, 1_323_101, 35_896, 963_373),
    "mobile": (23_111, 14_348, 1_164_394, 29_921, 617_146),
    "small": (3_000, 2_000, 30_000, 2_000, 60_000),
}
RAW_LINES = (22_507_155, 4_607_047)  # of the paper's two files, ratings_Books and _Movies_and_TV
STEPS = 500  # of our optimiser a timed run
SCALING_STEPS = 20  # the same on several devices, which share the cores of this machine
SCALING = (("conet", 16_384), ("", 16_384))  # variants and examples a domain, worth many devices
DENSE_STEPS = 50  # of the dense one, which is slower by far


class Report:
    """Collects named figures and ratios."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.results: list[dict[str, Any]] = []
        self.ratios: dict[str, float] = {}
        self.rates: dict[str, float] = {}

    def time(self, variants: dict[str, tuple[Callable[[], Any], float]]) -> dict[str, float]:
        """Times variants in turn.

        Args:
          variants: {name: (function that runs and blocks, items it works through)}; items are
            steps, users, rows or pairs, as the name says.

        Returns:
          {name: median seconds an item}.
        """
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in variants}
        for function, _ in variants.values():
            function()
        for _ in range(self.runs):
            for name, (function, _) in variants.items():
                began, cpu_began = time.perf_counter(), time.process_time()
                function()
                seconds[name].append(time.perf_counter() - began)
                cpu_seconds[name].append(time.process_time() - cpu_began)
        an_item = {}
        for name, (_, items) in variants.items():
            median = float(np.median(seconds[name]))
            an_item[name] = median / items
            self.results.append(
                {
                    "name": name,
                    "seconds": median / items,
                    # Of all threads: what other jobs on the machine take is not in it.
                    "cpu_seconds": float(np.median(cpu_seconds[name])) / items,
                    "runs": seconds[name],
                    "items_per_second": items / median,
                }
            )
            print(f"  {name}: {1e6 * median / items:,.2f} us an item", file=sys.stderr, flush=True)
        return an_item


def run(suites: tuple[str, ...], *, scale: str, runs: int) -> dict:
    """Runs suites and returns the report that ``launch/benchmark.py`` writes as JSON.

    Args:
      suites: of "train", "evaluate", "recommend", "population", "prepare", "run", "scaling".
      scale: a key of ``SCALES``.
      runs: timed runs of each variant.

    Returns:
      {"machine": …, "results": […], "ratios": {…}, "rates": {…}}.
    """
    report = Report(runs)
    if "scaling" in suites:
        jax.config.update("jax_num_cpu_devices", max(DEVICES))
    if set(suites) - {"prepare"}:
        dataset = _dataset(scale)
    for suite in suites:
        print(suite, file=sys.stderr, flush=True)
        if suite == "train":
            _train(report, dataset)
        elif suite == "evaluate":
            _evaluate(report, dataset)
        elif suite == "recommend":
            _recommend(report, dataset)
        elif suite == "population":
            _population(report)
        elif suite == "prepare":
            _prepare(report, scale)
        elif suite == "run":
            _whole_run(report, dataset)
        elif suite == "scaling":
            _scaling(report, dataset)
    device = jax.devices()[0]
    machine = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": f"{device.platform} {device.device_kind}",
        "scale": scale,
        "versions": versions(),
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    return {
        "machine": machine,
        "results": report.results,
        "ratios": report.ratios,
        "rates": report.rates,
    }


def table(report: dict) -> str:
    """Returns a report as an aligned table."""
    lines = [f"{'':44}{'us an item':>14}{'CPU us':>14}{'items/s':>16}"]
    for row in report["results"]:
        lines.append(
            f"{row['name']:44}{1e6 * row['seconds']:14,.2f}{1e6 * row['cpu_seconds']:14,.2f}"
            f"{row['items_per_second']:16,.0f}"
        )
    for title in ("ratios", "rates"):
        lines += ["", f"{title}"]
        for name, value in report[title].items():
            lines.append(f"{name:44}" + (f"{value:14.2f}" if value < 1e4 else f"{value:14,.0f}"))
    machine = report["machine"]
    lines += [
        "",
        f"{machine['device']}, {machine['cores']} cores, scale {machine['scale']}, "
        f"jax {machine['versions']['jax']}, peak memory "
        f"{machine['peak_memory_bytes'] / 2**30:.2f} GiB",
    ]
    return "\n".join(lines)


def _dataset(scale: str) -> Dataset:
    users, target_items, target_pairs, source_items, source_pairs = SCALES[scale]
    return synthetic.dataset(
        num_users=users,
        num_target_items=target_items,
        num_source_items=source_items,
        target_interactions=target_pairs,
        source_interactions=source_pairs,
        seed=0,
    )[0]


def _experiment(dataset: Dataset, variant: str = "conet", **fields: Any) -> Experiment:
    config = default_config(variant)
    config.update({"devices": 1, **fields})
    return make_experiment(config, dataset)


# Training


def _make_steps(experiment: Experiment, num_steps: int) -> tuple[Any, dict[str, devices.Route]]:
    """Batches and row plans of an epoch's first steps, made beforehand."""
    sizes = {name: len(table) for name, table in experiment.abstract_state().tables.items()}

    @jax.jit
    def make() -> Any:
        batches = jax.vmap(
            lambda step: sampling.sample_step(
                experiment.sampling_key,
                jnp.int32(0),
                step,
                experiment.interactions,
                experiment.plan,
            )
        )(jnp.arange(num_steps, dtype=jnp.int32))
        wanted = jax.vmap(lambda b: wanted_rows(experiment.model, b, sizes))(batches)
        return batches, jax.vmap(lambda rows: plan_rows(rows, sizes))(wanted)

    return jax.block_until_ready(make())


def _row_runner(experiment: Experiment, steps: Any, *, times: int = 1) -> Callable[[], None]:
    """Our step over given batches, on tables ``times`` as long as the data needs."""

    @jax.jit
    def longer() -> TrainState:
        state = initial_state(experiment)
        tables = {name: jnp.tile(table, (times, 1)) for name, table in state.tables.items()}
        return state.replace(tables=tables)

    def scan(state: TrainState, steps: Any) -> TrainState:
        def body(state: TrainState, step: Any) -> Any:
            return train_step(
                state, *step, experiment.hyper, model=experiment.model, settings=experiment.settings
            )

        return jax.lax.scan(body, state, steps)[0]

    compiled = jax.jit(scan, donate_argnums=0)
    holder = [compiled(longer(), steps)]
    holder[0] = settle_in_place(holder[0], experiment.hyper.learning_rate)

    def once() -> None:
        holder[0] = jax.block_until_ready(compiled(holder[0], steps))

    return once


def _dense_runner(experiment: Experiment, steps: Any) -> Callable[[], None]:
    """Dense ``optax.adam`` over all parameters: the same batches, scan and donation."""
    optimizer = optax.adam(experiment.hyper.learning_rate)
    batches = steps[0]

    def step(carry: tuple[Params, Any], batch: Any) -> Any:
        params, opt_state = carry

        def objective(params: Params) -> jax.Array:
            ids = experiment.model.lookups(batch)
            rows = {name: params.tables[name][index] for name, index in ids.items()}
            return experiment.model.loss(
                params.dense, rows, batch, experiment.hyper, reduction="sum"
            )[0]

        updates, opt_state = optimizer.update(jax.grad(objective)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    compiled = jax.jit(lambda carry, b: jax.lax.scan(step, carry, b)[0], donate_argnums=0)
    params = settled(initial_state(experiment), experiment.hyper.learning_rate)
    holder = [(params, optimizer.init(params))]

    def once() -> None:
        holder[0] = jax.block_until_ready(compiled(holder[0], batches))

    return once


def _epoch_runner(
    experiment: Experiment, num_steps: int, program: Callable[..., Any] | None = None
) -> Callable[[], None]:
    """Our step as in training: sampling and planning within the program."""
    holder = [initial_state(experiment)]
    program = program or partial(
        train_chunk,
        model=experiment.model,
        plan=experiment.plan,
        settings=experiment.settings,
        num_steps=num_steps,
    )
    start = np.int32(0)

    def once() -> None:
        arguments = experiment.interactions, experiment.sampling_key, start, start, experiment.hyper
        holder[0], _ = jax.block_until_ready(program(holder[0], *arguments))

    once()
    holder[0] = settle_in_place(holder[0], experiment.hyper.learning_rate)
    return once


def _train(report: Report, dataset: Dataset) -> None:
    for pairing, suffix in (("random", ""), ("same_user", "_same_user")):
        experiment = _experiment(dataset, pairing=pairing)
        count = min(STEPS, experiment.plan.steps)
        dense_count = min(DENSE_STEPS, count)
        steps = _make_steps(experiment, count)
        few = jax.tree.map(lambda x, n=dense_count: x[:n], steps)
        kinds = ("row", "dense", "row_tables_x4", "row_bfloat16")
        names = [f"train_step_{kind}{suffix}" for kind in kinds]
        half = _experiment(dataset, pairing=pairing, dtype="bfloat16")
        epoch = f"train_epoch_step{suffix}"
        seconds = report.time(
            {
                names[0]: (_row_runner(experiment, steps), count),
                names[1]: (_dense_runner(experiment, few), dense_count),
                names[2]: (_row_runner(experiment, steps, times=4), count),
                names[3]: (_row_runner(half, steps), count),
                epoch: (_epoch_runner(experiment, count), count),
            }
        )
        row = seconds[names[0]]
        report.ratios[f"train_step_dense_over_row{suffix}"] = seconds[names[1]] / row
        report.ratios[f"train_step_tables_x4{suffix}"] = seconds[names[2]] / row
        report.ratios[f"train_step_bfloat16{suffix}"] = seconds[names[3]] / row
        report.ratios[f"epoch_over_steps{suffix}"] = seconds[epoch] / row
        rows = 2 * experiment.plan.batch_examples
        report.rates[f"train_rows_per_second{suffix}"] = rows / seconds[epoch]
    if jax.devices()[0].platform != "cpu":
        _train_large_batches(report, dataset)


def _train_large_batches(report: Report, dataset: Dataset) -> None:
    """Batches of 1,024 to 1 M examples, against the roofline measured on this device."""
    bandwidth, matrix = _roofline(report)
    for batch in (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20):
        experiment = _experiment(dataset, pairing="same_user", batch_size=batch // 2)
        count = max(1, min(20, experiment.plan.steps))
        name = f"train_epoch_step_batch_{batch}"
        seconds = report.time({name: (_epoch_runner(experiment, count), count)})[name]
        state = experiment.abstract_state()
        # A row is read and written once, packed; the towers' arithmetic is forward and backward.
        width = sum(3 * 4 * (table.shape[1]) for table in state.tables.values())
        weights = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(state.dense))
        ideal = max(2 * batch * width / bandwidth, 3 * 2 * batch * weights / matrix)
        report.rates[f"train_rows_per_second_batch_{batch}"] = 2 * batch / seconds
        report.ratios[f"roofline_over_step_batch_{batch}"] = ideal / seconds


def _roofline(report: Report) -> tuple[float, float]:
    """Measured memory bandwidth (bytes/s) and float32 matrix rate (operations/s)."""
    block = jnp.ones((1 << 28,), jnp.float32)
    square = jnp.ones((8192, 8192), jnp.float32)
    add = jax.jit(lambda x: x + 1)
    multiply = jax.jit(lambda x: x @ x)
    seconds = report.time(
        {
            "roofline_copy_bytes": (lambda: add(block).block_until_ready(), 2.0 * block.nbytes),
            "roofline_matrix_operations": (
                lambda: multiply(square).block_until_ready(),
                2.0 * 8192**3,
            ),
        }
    )
    return 1 / seconds["roofline_copy_bytes"], 1 / seconds["roofline_matrix_operations"]


# Scaling

DEVICES = (1, 2, 4, 8)
_COLLECTIVE = re.compile(
    r"= (.+?) (all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute)(?:-start)?\("
)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\]")


def _bytes(shape: str) -> int:
    """Bytes of the arrays in a shape of HLO.

    >>> _bytes("(f32[8,4]{1,0}, s32[], pred[3])")
    135
    """
    return sum(
        int(bits or 8) // 8 * math.prod(int(n) for n in dims.split(",") if n)
        for bits, dims in _ARRAY.findall(shape)
    )


def collectives(
    program: str, num_steps: int = 1
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Reads what devices exchange in a step off the text of a compiled chunk of steps.

    Args:
      program: HLO.
      num_steps: steps of its loop, for all of which what stands outside of the loop is.

    Returns:
      ([(operation, bytes of its result on a device), …] of all, and of those that run where rows
      fit their usual room, see ``devices.capacity``).
    """
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in program.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            name = head[2]
            entry = name if head[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def of(name: str, share: float, first_branch: int) -> list[tuple[str, float]]:
        found = []
        for line in bodies[name]:
            operation = _COLLECTIVE.search(line)
            if operation:
                found.append((operation[2], share * _bytes(operation[1])))
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            called = branches[1].split(",")[first_branch:] if branches else []
            ways = re.search(r"true_computation=(\S+?), false_computation=([^,\s]+)", line)
            if ways:
                called = [ways[2], ways[1]][first_branch:]
            called += re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", line)
            for callee in called:
                found += of(callee.strip(" %,"), share, first_branch)
            for callee in re.findall(r"body=%?([\w.-]+)", line):
                found += of(callee, 1.0, first_branch)
        return found

    return of(entry, 1 / num_steps, 0), of(entry, 1 / num_steps, 1)


def compile_steps(experiment: Experiment, state: Any, num_steps: int) -> Any:
    """Compiles a chunk of steps; call it with ``chunk_arguments``."""
    return chunk_program.lower(
        *chunk_arguments(experiment, state),
        model=experiment.model,
        plan=experiment.plan,
        settings=experiment.settings,
        num_steps=num_steps,
        mesh=experiment.mesh,
    ).compile()


def chunk_arguments(experiment: Experiment, state: Any) -> tuple[Any, ...]:
    """Returns the arguments of a chunk of the first epoch from its first step."""
    start = np.int32(0)
    return state, experiment.interactions, experiment.sampling_key, start, start, experiment.hyper


def traffic(experiment: Experiment, compiled: Any, *, num_steps: int = 1) -> dict[str, Any]:
    """Reads off a compiled chunk of steps what its devices exchange in a step.

    Returns:
      ``collectives`` and ``usual``: see above; ``batch_rows`` (of the table that a batch reads
      most of), ``rows_a_device`` (of these), ``capacity`` (rows of the exchange's buffer on a
      device), ``row_width``, ``dense_bytes``.
    """
    everything, usual = collectives(compiled.as_text(), num_steps)
    state, start = experiment.abstract_state(), np.int32(0)
    interactions = interactions_on(experiment.dataset, devices.one_device())

    def ids() -> Any:
        key = jax.random.key(0)
        batch = sampling.sample_step(key, start, start, interactions, experiment.plan)
        return experiment.model.lookups(batch)

    n, rows = experiment.mesh.size, max(x.size for x in jax.eval_shape(ids).values())
    each = -(-rows // n)
    return {
        "collectives": everything,
        "usual": usual,
        "batch_rows": n * each,
        "rows_a_device": each,
        "capacity": n * devices.capacity(each, n),
        "row_width": max(
            x.shape[1] for x in jax.eval_shape(experiment.params, state).tables.values()
        ),
        "dense_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.dense)),
    }


def _scaling(report: Report, dataset: Dataset) -> None:
    """Step, exchange and memory of 1, 2, 4, 8 devices; one against plain ``jit`` and ``pmap``."""
    for variant, batch in SCALING:
        for n in (n for n in DEVICES if n <= jax.device_count()):
            _scale(report, dataset, variant, batch, n)
    experiment = _experiment(dataset)
    count = min(CHUNK_STEPS, experiment.plan.steps)
    static = dict(
        model=experiment.model, plan=experiment.plan, settings=experiment.settings, num_steps=count
    )
    plain = jax.jit(partial(run_steps, **static), donate_argnums=0)
    seconds = report.time(
        {
            "scaling_step_mapped": (_epoch_runner(experiment, count), count),
            "scaling_step_plain_jit": (_epoch_runner(experiment, count, plain), count),
            "scaling_step_pmap": (_pmap_runner(experiment, count, static), count),
        }
    )
    cpu_seconds = {row["name"]: row["cpu_seconds"] for row in report.results}
    for other in ("plain_jit", "pmap"):
        for kind, of in (("", seconds), ("_cpu", cpu_seconds)):
            ratio = of["scaling_step_mapped"] / of[f"scaling_step_{other}"]
            report.ratios[f"scaling_mapped_over_{other}{kind}"] = ratio


def _pmap_runner(
    experiment: Experiment, num_steps: int, static: dict[str, Any]
) -> Callable[[], None]:
    """``_epoch_runner`` on one device under ``jax.pmap``, whose arrays have an axis of devices."""
    program = jax.pmap(
        partial(run_steps, **static),
        axis_name=devices.AXIS,
        in_axes=(0, 0, None, None, None, None),
        devices=list(experiment.mesh.devices.flat),
        donate_argnums=0,
    )
    state, interactions = jax.tree.map(
        lambda x: x[None], (initial_state(experiment), experiment.interactions)
    )
    start = np.int32(0)
    arguments = interactions, experiment.sampling_key, start, start, experiment.hyper
    state = jax.tree.map(lambda x: x[0], program(state, *arguments)[0])
    state = settle_in_place(state, experiment.hyper.learning_rate)
    holder = [jax.tree.map(lambda x: x[None], state)]

    def once() -> None:
        holder[0], _ = jax.block_until_ready(program(holder[0], *arguments))

    return once


def _scale(report: Report, dataset: Dataset, variant: str, batch: int, n: int) -> None:
    """One variant and batch size on n devices."""
    experiment = _experiment(dataset, variant, devices=n, batch_size=batch // 2, negatives=1)
    count = min(SCALING_STEPS, experiment.plan.steps)
    # What the recipe's tables hold does not matter, and to fit them takes long.
    params = init_params(experiment.model, experiment.key, experiment.sizes, experiment.mesh)
    state = init_state(experiment.model, params, experiment.settings)
    compiled = compile_steps(experiment, state, count)
    name = f"scaling_{variant or 'recipe'}_batch_{batch}_devices_{n}"
    moved = traffic(experiment, compiled, num_steps=count)
    report.rates |= {
        f"{name}_bytes_exchanged": sum(size for _, size in moved["usual"]),
        f"{name}_bytes_of_largest": max((size for _, size in moved["usual"]), default=0.0),
        f"{name}_bytes_of_tables": _held(state.tables),
        f"{name}_bytes_of_interactions": _held(experiment.interactions),
        f"{name}_bytes_of_temporaries": compiled.memory_analysis().temp_size_in_bytes,
        f"{name}_busiest_over_mean": _busiest_over_mean(experiment),
    }
    holder = [compiled(*chunk_arguments(experiment, state))[0]]
    holder[0] = settle_in_place(holder[0], experiment.hyper.learning_rate)

    def once() -> None:
        holder[0] = jax.block_until_ready(compiled(*chunk_arguments(experiment, holder[0])))[0]

    report.time({f"{name}_step": (once, count)})


def _held(tree: Any) -> int:
    """Bytes on the first device."""
    shards = [x.addressable_shards[0] for x in jax.tree.leaves(tree)]
    return sum(shard.data.nbytes for shard in shards)


def _busiest_over_mean(experiment: Experiment) -> float:
    """Distinct rows that the busiest device reads and writes in a step, over the mean device's."""
    interactions = interactions_on(experiment.dataset, devices.one_device())
    n, start = experiment.mesh.size, np.int32(0)
    batch = sampling.sample_step(jax.random.key(0), start, start, interactions, experiment.plan)
    rows = sum(
        np.bincount(np.unique(np.asarray(ids)) // experiment.model.copies % n, minlength=n)
        for ids in experiment.model.lookups(batch).values()
    )
    return float(rows.max() / rows.mean())


# Evaluation


def _first_users(held_out: HeldOut, count: int) -> HeldOut:
    return HeldOut(*(x[:count] for x in held_out))


def _loop_runner(model: Model, projected: Any, held_out: HeldOut) -> Callable[[], None]:
    """One jitted call a user, candidates from the host, the rank read back before the next."""

    @jax.jit
    def rank(projected: Any, user: jax.Array, items: jax.Array, mask: jax.Array) -> Any:
        scores = model.scores(projected, user[None], items[None])
        return ranking.count_above(scores[0], mask)

    listed = np.concatenate([held_out.items[:, None], held_out.candidates], axis=1)

    def once() -> None:
        for user, items, mask in zip(held_out.users, listed, held_out.mask, strict=True):
            jax.device_get(rank(projected, user, items, mask))

    return once


def _evaluate(report: Report, dataset: Dataset) -> None:
    test = dataset.test
    for inference in ("target", "cross"):
        experiment = _experiment(dataset, inference=inference)
        params = settled(initial_state(experiment), experiment.hyper.learning_rate)

        def everyone(experiment: Any = experiment, params: Any = params) -> None:
            ranking.rank_held_out(experiment.model, params, experiment.interactions, test)

        pairs = len(test.users) * (1 + test.candidates.shape[1])
        suffix = "" if inference == "target" else "_cross"
        seconds = report.time({f"evaluate_pairs{suffix}": (everyone, pairs)})
        report.rates[f"eval_pairs_per_second{suffix}"] = 1 / seconds[f"evaluate_pairs{suffix}"]
        if inference == "cross":
            continue
        some = _first_users(test, 4000)
        projected = ranking.project(params, experiment.interactions, model=experiment.model)
        seconds = report.time(
            {
                "evaluate_users_loop": (
                    _loop_runner(experiment.model, projected, some),
                    len(some.users),
                ),
                "evaluate_users_vmap": (
                    lambda s=some, p=projected, m=experiment.model: ranking.rank_projected(m, p, s),
                    len(some.users),
                ),
            }
        )
        report.ratios["evaluate_loop_over_vmap"] = (
            seconds["evaluate_users_loop"] / seconds["evaluate_users_vmap"]
        )
        quarter = _first_users(test, len(test.users) // 4)
        memory = [
            ranking.ranker_memory(experiment.model, projected, users) for users in (quarter, test)
        ]
        report.ratios["evaluate_memory_x4"] = memory[1] / memory[0]
        few = _first_users(test, 256)
        touched = touched_items(dataset)
        full = len(few.users) * dataset.target.num_items
        seconds = report.time(
            {
                "full_ranking_pairs": (
                    lambda t=experiment, p=params, f=few, all_=touched: ranking.rank_full(
                        t.model, p, t.interactions, f, all_
                    ),
                    full,
                )
            }
        )
        report.rates["full_ranking_pairs_per_second"] = 1 / seconds["full_ranking_pairs"]


def _recommend(report: Report, dataset: Dataset) -> None:
    """The whole catalogue for a block of users after another, and for one, tables projected."""
    experiment = make_experiment(_recipe_of_amazon(), dataset)
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


def _recipe_of_amazon() -> Any:
    config = default_config()
    config.layers = (64, 32, 16, 8)  # as in configs/amazon.py
    return config


def _whole_run(report: Report, dataset: Dataset) -> None:
    """Thirty epochs of configs/amazon.py, validated and saved; peak memory is the process's."""
    config = _recipe_of_amazon()
    config.update(name="benchmark", epochs=30, patience=30)
    with tempfile.TemporaryDirectory() as folder:
        result = fit(config, Path(folder) / "run", dataset=dataset)
    report.rates["run_seconds"] = result["seconds"]
    report.rates["run_seconds_per_epoch"] = result["seconds"] / result["epochs"]


# Population


def _population(report: Report) -> None:
    dataset = synthetic.dataset(
        num_users=3_000,
        num_target_items=300,
        num_source_items=400,
        target_interactions=15_000,
        source_interactions=90_000,
        dim=3,
        noise=0.15,
        seed=0,
    )[0]
    members = 8
    experiment = _experiment(dataset)
    experiments = [_experiment(dataset, seed=seed) for seed in range(members)]
    steps = experiment.plan.steps

    def stack(values: list[Any]) -> Any:
        return jax.tree.map(lambda *x: jnp.stack(x), *values)

    def states() -> Any:
        return jax.block_until_ready(stack([t.init() for t in experiments]))

    keys = jnp.stack([t.sampling_key for t in experiments])
    hypers = stack([t.hyper for t in experiments])
    static = dict(
        model=experiment.model, plan=experiment.plan, settings=experiment.settings, num_steps=steps
    )

    def eight(compiled: Any, state: Any, epoch: int = 0) -> Any:
        out = compiled(state, experiment.interactions, keys, jnp.int32(epoch), jnp.int32(0), hypers)
        return jax.block_until_ready(out)[0]

    def one(compiled: Any, state: Any, epoch: int = 0) -> Any:
        arguments = (
            experiment.interactions,
            experiment.sampling_key,
            jnp.int32(epoch),
            jnp.int32(0),
        )
        return jax.block_until_ready(compiled(state, *arguments, experiment.hyper))[0]

    def compile_program(lower: Any, state: Any, key: Any, hyper: Any) -> Any:
        arguments = (state, experiment.interactions, key, jnp.int32(0), jnp.int32(0), hyper)
        return lower(*arguments, **static).compile()

    compile_seconds, programs = {}, {}
    one_program = partial(chunk_program.lower, mesh=experiment.mesh)
    for name, lower, state, key, hyper in (
        ("one", one_program, initial_state(experiment), experiment.sampling_key, experiment.hyper),
        ("eight", train_population.lower, states(), keys, hypers),
    ):
        began = time.perf_counter()
        programs[name] = compile_program(lower, state, key, hyper)
        compile_seconds[name] = time.perf_counter() - began
    rate = experiment.hyper.learning_rate
    holder = {"one": initial_state(experiment), "eight": states()}
    settle = jax.jit(jax.vmap(settle_in_place, in_axes=(0, None)))
    warm = -(-SETTLE_STEP // steps)
    for epoch in range(warm):
        holder["one"] = one(programs["one"], holder["one"], epoch)
        holder["eight"] = eight(programs["eight"], holder["eight"], epoch)
    holder["one"] = settle_in_place(holder["one"], rate)
    holder["eight"] = settle(holder["eight"], rate)

    def run_one() -> None:
        holder["one"] = one(programs["one"], holder["one"])

    def run_eight() -> None:
        holder["eight"] = eight(programs["eight"], holder["eight"])

    seconds = report.time(
        {"population_step_1": (run_one, steps), "population_step_8": (run_eight, steps)}
    )
    ratio = seconds["population_step_8"] / seconds["population_step_1"]
    report.ratios["population_8_over_1"] = ratio
    # A run of the demo is its compilation and some twenty epochs.
    epochs = 20
    whole = {
        name: compile_seconds[name] + epochs * steps * seconds[f"population_step_{count}"]
        for name, count in (("one", 1), ("eight", 8))
    }
    report.ratios["population_8_over_1_with_compilation"] = whole["eight"] / whole["one"]


# Preparation


def write_raw(path: Path, lines: int, *, seed: int, users: int, items: int) -> None:
    """Writes a raw Amazon ratings file: user,item,rating,timestamp, skewed, without a header.

    Args:
      path: the file.
      lines: its length.
      seed: of the draw.
      users: distinct user ids at most; both files of a pair draw from the same.
      items: distinct item ids at most.
    """
    import polars as pl

    rng = np.random.default_rng(seed)
    with open(path, "wb") as file:
        for first in range(0, lines, 2_000_000):
            count = min(2_000_000, lines - first)
            # A few active users and popular items, and a long tail.
            user, item = (
                (size * ((rng.random(count) + 0.1) / 1.1) ** 4).astype(np.int64)
                for size in (users, items)
            )
            frame = pl.DataFrame(
                {
                    "user": user,
                    "item": item,
                    "rating": rng.choice(5, count, p=[0.08, 0.05, 0.09, 0.19, 0.59]) + 1.0,
                    "timestamp": rng.integers(900_000_000, 1_400_000_000, count),
                }
            ).with_columns(
                pl.format("A{}", pl.col("user").cast(pl.String).str.zfill(13)).alias("user"),
                pl.format("B{}", pl.col("item").cast(pl.String).str.zfill(9)).alias("item"),
            )
            frame.write_csv(file, include_header=False)


def _prepare(report: Report, scale: str) -> None:
    fraction, core = (0.01, 1) if scale == "small" else (1.0, 5)
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("books.csv", "movies.csv")]
        users = max(1, int(8_000_000 * fraction))
        for seed, (path, count, items) in enumerate(
            zip(paths, RAW_LINES, (2_300_000, 200_000), strict=True)
        ):
            size = int(count * fraction)
            write_raw(path, size, seed=seed, users=users, items=max(5_000, int(items * fraction)))
        total = sum(int(count * fraction) for count in RAW_LINES)
        began = time.perf_counter()
        command = [
            sys.executable,
            str(root / "launch" / "prepare.py"),
            f"--target={paths[0]}",
            f"--source={paths[1]}",
            f"--min_user_items={core}",
            f"--min_item_users={core}",
            f"--out={Path(folder) / 'out'}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"prepare failed: {done.stderr}")
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak, cpu_seconds = 1024 * children.ru_maxrss, children.ru_utime + children.ru_stime
    report.results.append(
        {
            "name": "prepare_raw_lines",
            "seconds": seconds / total,
            "cpu_seconds": cpu_seconds / total,
            "runs": [seconds],
            "items_per_second": total / seconds,
        }
    )
    report.rates["prepare_seconds"] = seconds
    report.rates["prepare_peak_gib"] = peak / 2**30
