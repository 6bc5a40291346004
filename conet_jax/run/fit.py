"""A run: train, validate each epoch, stop early, test once on the best, and write it all down.

``fit`` is the one stateful function of the package. What it leaves in the workdir:
``config.json``, ``metrics.jsonl`` (a row an epoch), ``checkpoints/``, ``ranks.npz`` (of every
held-out item at the end), ``result.json``, ``result.md``. The same call again goes on from the
latest checkpoint and ends with the same ``result.json``, bit for bit in every field but
``seconds``.
"""

import io
import json
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from ml_collections import ConfigDict

import conet_jax
from conet_jax import config as config_lib
from conet_jax import models
from conet_jax.data.load import check_users
from conet_jax.data.types import HELD_OUT, Dataset, held_out_parts
from conet_jax.devices import processes
from conet_jax.errors import InputError
from conet_jax.files import write_arrays, write_json, write_text
from conet_jax.models.base import facing
from conet_jax.run import earlier, jax_settings, lists, lock, loop, memory, signals, tune
from conet_jax.run.checkpoints import Checkpoints
from conet_jax.run.epoch import CHUNK_STEPS, CutShort
from conet_jax.run.experiment import Experiment, check_cuts, fit_pairs, untuned
from conet_jax.run.logs import (
    Console,
    MetricsFile,
    TensorBoard,
    epoch_line,
    found_line,
    headline,
    load_tensorboardx,
    result_markdown,
    saved_line,
    search_line,
    start_line,
    taken_over_line,
)
from conet_jax.run.start import initial_state
from conet_jax.run.workdir import (
    claim_workdir,
    load_for,
    make_workdir,
    stored_start,
    write_config,
)
from conet_jax.train import ranking

VERSIONED = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "polars")


def fit(
    config: ConfigDict,
    workdir: str | Path,
    *,
    dataset: Dataset | None = None,
    quiet: bool = False,
    tensorboard: bool = False,
    start_from: str | Path | None = None,
) -> dict:
    """Trains, or goes on training, and returns the contents of ``result.json``.

    Args:
      config: see ``config.default_config``.
      workdir: folder of the run, made if absent.
      dataset: the data; by default that of ``load_for``.
      quiet: print nothing.
      tensorboard: write event files to WORKDIR/tensorboard, too.
      start_from: folder of an earlier run whose parameters, by id, are the start: ``run.earlier``.

    Returns:
      The result.

    Raises:
      InputError: bad config or data, a workdir of another run or in use by another process, a loss
        that is not finite.
      OSError: the disk is full, or the workdir has gone; what was saved before is as it was.
      processes.PeerLost: another process of the run died.
      signals.Interrupted: a signal asked to stop, and the run is saved.
    """
    workdir = Path(workdir)
    if tensorboard:
        load_tensorboardx()  # or say at once that it is not there
    if dataset is None:
        config_lib.validate(config)
        dataset = load_for(config, workdir)
    experiment = untuned(config, dataset)
    check_users(dataset, "test")
    check_cuts(config, *held_out_parts(dataset).values())
    processes.together(lambda: make_workdir(workdir))
    with lock.owned(workdir):
        processes.together(lambda: claim_workdir(workdir, config, dataset, start_from))
        checkpoints = Checkpoints(workdir / "checkpoints")
        out = io.StringIO() if quiet or not processes.is_main() else None
        try:
            with processes.watch_peers():
                return _fit(experiment, workdir, checkpoints, out, tensorboard, start_from)
        finally:
            # Closing waits for all processes.
            if not isinstance(sys.exception(), processes.PeerLost):
                checkpoints.close()


def _fit(
    experiment: Experiment,
    workdir: Path,
    checkpoints: Checkpoints,
    out: TextIO | None,
    tensorboard: bool,
    start_from: str | Path | None,
) -> dict:
    config = experiment.config
    progress, state, part = loop.Progress(), None, None
    told: set[str] = set()

    def say(text: str) -> None:
        print(text, file=out, flush=True)  # there is no bar yet

    say(headline(experiment, workdir))
    say(memory.line(experiment, CHUNK_STEPS))
    found = stored_start(workdir, config, experiment.dataset)
    if checkpoints.latest_epoch() is None:
        if start_from:
            experiment, found = _taking_over(experiment, start_from)
            say(taken_over_line(found["started_from"]))
        elif "started_from" in found:
            found = {}  # of another command, that never came to a checkpoint
    experiment, seconds = _tuned(experiment, workdir, found, say)
    if checkpoints.latest_epoch() is not None:
        state, stored = experiment.resume(checkpoints)
        progress, part = loop.stored_progress(stored)
        if config.epochs < progress.epoch:
            raise InputError(
                f"config.epochs is {config.epochs}, but the run in {workdir} has done "
                f"{progress.epoch}; give as many or more to go on"
            )
        checkpoints.forget_after(progress.epoch)
    else:
        if line := start_line(experiment):
            say(line)
        state = initial_state(experiment)
    metrics_file, board = None, None
    if processes.is_main():
        write_config(workdir, config, experiment.dataset, found)
        metrics_file = MetricsFile(workdir / "metrics.jsonl", epochs=progress.epoch)
        if tensorboard:
            board = TensorBoard(workdir / "tensorboard", epochs=progress.epoch)
    steps, rows_a_step = 1, 1
    if experiment.plan is not None:
        steps, rows_a_step = (
            experiment.plan.steps,
            experiment.plan.batch_examples * len(experiment.plan.domains),
        )
    console = Console(epochs=config.epochs, steps=steps, rows_a_step=rows_a_step, out=out)
    try:
        if progress.epoch or part is not None:
            steps_done = f" and {part.done:,} steps" if part is not None else ""
            console.line(f"resuming after epoch {progress.epoch}{steps_done}")
        with signals.deferred():
            for end in loop.train_on(experiment, state, progress, console, checkpoints, part):
                progress = end.progress
                if end.better:
                    checkpoints.save_best(progress.epoch, experiment.to_save(end.params))
                if progress.epoch == 1:
                    end.row.update(found)
                    end.row["seconds"] |= {} if seconds is None else {"search": seconds}
                if metrics_file is not None:
                    metrics_file.append(end.row)
                if board is not None:
                    board.append(end.row)
                saved = experiment.resumable(end.state)
                checkpoints.save_latest(progress.epoch, saved, progress.to_json())
                console.line(epoch_line(end.row, f"ndcg@{config.eval_k[0]}", end.better))
                for warning in end.warnings:
                    if warning not in told:  # once, not each epoch
                        console.line(f"warning: {warning}")
                        told.add(warning)
                del end, saved
                memory.return_memory()
                if signum := signals.requested():
                    raise signals.Interrupted(signum, saved_line(workdir, progress.epoch))
        result, ranks = _finish(experiment, progress, checkpoints)
        result |= {"config": json.loads(config.to_json()), **found}
    except CutShort as cut:
        if cut.state is not None:
            stored = {**progress.to_json(), "part": cut.part.to_json()}
            checkpoints.save_latest(progress.epoch + 1, experiment.to_save(cut.state), stored)
        where = saved_line(workdir, progress.epoch, cut.part.done)
        raise signals.Interrupted(cut.signum, where) from None
    finally:
        console.close()
        if board is not None:
            board.close()
    if processes.is_main():
        write_arrays(workdir / "ranks.npz", **ranks)
        write_text(workdir / "result.md", result_markdown(result))
        write_json(workdir / "result.json", result)
    print(result_markdown(result), file=out)
    return result


def _taking_over(
    experiment: Experiment, start_from: str | Path
) -> tuple[Experiment, dict[str, Any]]:
    """The experiment with what an earlier run knows, and what config.json says of it."""
    before = earlier.load(start_from, experiment)
    found = {"started_from": before.record}
    if before.constants and tune.is_due(experiment.config):
        found["tuned"] = {**before.constants, "trials": 0}
    return experiment._replace(earlier=before), found


def _tuned(
    experiment: Experiment, workdir: Path, found: dict[str, Any], say: Callable[[str], None]
) -> tuple[Experiment, float | None]:
    """Tunes the start, and adds it to ``found``: (experiment, seconds of the search if it ran)."""
    config, dataset = experiment.config, experiment.dataset
    if not tune.is_due(config):
        return experiment, None
    seconds = None
    due = processes.agreed(lambda: np.int32("tuned" not in found), np.int32(0))
    if due:  # on all devices, and so by all processes
        say(search_line(config.ials_trials))
        best = tune.search(config, dataset, fit_pairs(dataset), experiment.mesh)
        seconds = best.seconds

    def settle() -> np.ndarray:
        if due:
            ndcg = {f"ndcg@{config.eval_k[0]}": best.ndcg}
            found["tuned"] = {**best.constants, **ndcg, "trials": best.trials}
            write_config(workdir, config, dataset, found)
        say(found_line(found["tuned"], seconds))
        return np.float32([*tune.constants(config, found["tuned"]).values()])

    names = models.tuned_fields(config)
    values = processes.agreed(settle, np.zeros(len(names), np.float32))
    constants = dict(zip(names, map(tune.rounded, values), strict=True))
    return experiment.tuned(constants), seconds


def _finish(
    experiment: Experiment, progress: loop.Progress, checkpoints: Checkpoints
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Evaluates the best checkpoint, on test for the first and only time: (result, ranks)."""
    config, dataset = experiment.config, experiment.dataset
    params = experiment.best(checkpoints, progress.best_epoch)
    metrics, arrays = {}, {}
    parts = held_out_parts(dataset)
    for split in ("test", "valid", *(name for name in parts if name not in ("test", "valid"))):
        model = facing(experiment.model, HELD_OUT[split])
        if model is None or (split == "test_target_only" and model.shared_users):
            continue  # it ranks no source items, or knows no such users
        everything, warm = ranking.rank_twice(
            model,
            params,
            experiment.interactions,
            parts[split],
            experiment.trained_items(HELD_OUT[split]),
        )
        for name, ranked in ((split, everything), (f"{split}_warm", warm)):
            metrics[name] = ranked.summarize(k=config.eval_k)
            arrays[f"{name}_users"] = ranked.users
            arrays |= {f"{name}_{field}": value for field, value in ranked.ranks._asdict().items()}
    plain = jax.eval_shape(experiment.params, experiment.abstract_state())
    result = {
        **metrics,
        "lists": lists.measure(experiment, params),
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "seed": config.seed,
        "dataset": {"hash": dataset.meta["hash"], **dataset.meta["counts"]},
        **({"rollbacks": progress.rollbacks} if progress.rollbacks else {}),
        "parameters": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(plain)),
        "seconds": round(progress.seconds, 3),
        "versions": versions(),
        "jax_settings": jax_settings.current(),
    }
    return result, arrays


def versions() -> dict[str, str]:
    """Returns the versions of everything that a result depends on, and the device's kind."""
    return {
        "conet_jax": conet_jax.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in VERSIONED},
        "device": jax.devices()[0].device_kind,
    }
