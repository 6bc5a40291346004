"""What is left when a run is killed, stopped, damaged, run twice or out of disk."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import crash
import numpy as np
import pytest
import soak
from helpers import MEDIUM, ROOT, assert_one_line_error, launch, tiny

from conet_jax.data import synthetic
from conet_jax.errors import InputError
from conet_jax.run import checkpoints, lock, signals, whereabouts
from conet_jax.run.experiment import make_experiment
from conet_jax.run.fit import fit
from conet_jax.run.workdir import restore
from conet_jax.studies import figures, population, sweep, table2
from conet_jax.train.chunk import chunk_lengths, train_chunk


@pytest.fixture(scope="module")
def data():
    return synthetic.dataset(**MEDIUM)[0]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run, and what it leaves but for times."""
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    fit(tiny(), workdir, dataset=data, quiet=True)
    return workdir, crash.results(workdir)


def copied(finished, tmp_path):
    """A copy that has its last epoch before it."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    for name in ("result.json", "result.md", "ranks.npz"):
        (workdir / name).unlink()
    return workdir


# Killed.


def test_kills_in_an_epoch_and_in_a_checkpoint_resume_to_the_same_results(tmp_path):
    tiny = crash.scenarios(tmp_path)["tiny"]
    with crash.Running(tiny, tmp_path / "whole") as run:
        run.finish()
    workdir, rng = tmp_path / "killed", random.Random(0)
    spans = {("epoch", 0): 0.1, ("checkpoint", 0): 0.02}
    for phase in ("epoch", "checkpoint"):
        assert crash.killed(tiny, workdir, spans, phase, rng) in crash.PHASES
        crash.check_whole(workdir)
    with crash.Running(tiny, workdir) as run:
        run.finish()
    assert crash.results(workdir) == crash.results(tmp_path / "whole")


@pytest.mark.slow
def test_ten_kills_over_all_kinds_of_run_and_phases_resume_to_the_same_results(tmp_path):
    command = [sys.executable, ROOT / "tests" / "crash.py", "--kills=10", "--chain=2"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}"], capture_output=True, text=True, check=True
    )
    assert "11 of 11 kills resumed to the same results" in done.stdout


# Stopped by a signal.


def request(monkeypatch, *, call):
    """Makes a run find, the ``call``-th time that it asks, that a signal has come."""
    asked = iter(range(1, 1000))
    monkeypatch.setattr(signals, "requested", lambda: signal.SIGTERM if next(asked) == call else 0)


@pytest.mark.parametrize("call", [1, 2, 4, 5])  # in an epoch, at its last call, after it
def test_signal_in_an_epoch_saves_the_part_that_is_done(data, tmp_path, monkeypatch, call):
    steps = make_experiment(tiny(), data).plan.steps
    monkeypatch.setattr("conet_jax.run.epoch.CHUNK_STEPS", -(-steps // 2))
    lengths = chunk_lengths(steps, -(-steps // 2))
    assert len(lengths) == 2  # a run asks three times an epoch: after each, and after the epoch
    fit(tiny(), tmp_path / "whole", dataset=data, quiet=True)
    with monkeypatch.context() as patch:
        request(patch, call=call)
        with pytest.raises(signals.Interrupted, match="stopped by SIGTERM: saved after") as at:
            fit(tiny(), tmp_path / "run", dataset=data, quiet=True)
    epochs, chunks = divmod(call - 1, 3)
    done = sum(lengths[: chunks + 1])
    expected = f"epoch {epochs} and {done} steps in" if chunks < 2 else f"epoch {epochs + 1} in"
    assert expected in str(at.value)
    trained = []
    run = train_chunk

    def counted(*args, num_steps, **static):
        trained.append(num_steps)
        return run(*args, num_steps=num_steps, **static)

    monkeypatch.setattr("conet_jax.run.epoch.train_chunk", counted)
    fit(tiny(), tmp_path / "run", dataset=data, quiet=True)
    assert sum(trained) == 3 * steps - epochs * steps - done
    assert crash.results(tmp_path / "run") == crash.results(tmp_path / "whole")


def test_signal_in_a_population_saves_the_part_that_is_done(data, tmp_path, monkeypatch):
    configs = [tiny(seed=seed) for seed in (0, 1)]
    monkeypatch.setattr(population, "_STEPS", 16)
    steps = make_experiment(configs[0], data).plan.steps
    done = sum(chunk_lengths(steps, 8)[:2])

    def numbers(records):
        return crash.without_times(records)

    expected = numbers(population.train(configs, data, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        request(patch, call=2)
        with pytest.raises(signals.Interrupted, match=f"after epoch 0 and {done} steps"):
            population.train(configs, data, tmp_path / "run")
    assert numbers(population.train(configs, data, tmp_path / "run")) == expected


def test_signals_do_what_they_always_do_without_a_launcher():
    # Jobs in the background are started with SIGINT ignored, so the default is no question.
    assert signals._handle not in map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))
    assert signals.requested() == 0


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("time.sleep(60)", 143, ["stopped by SIGTERM"]),
        # Python does not come to its handler in there.
        ("hashlib.pbkdf2_hmac('sha1', b'', b'', 1 << 30)", 143, ["in a long call"]),
        (
            "with signals.deferred():\n  while not signals.requested(): time.sleep(0.01)",
            143,
            ["saving; once more to stop at once", "stopped by SIGTERM"],
        ),
        (
            "with signals.deferred():\n  while not signals.requested(): time.sleep(0.01)",
            129,
            ["SIGHUP: saving; once more to stop at once", "stopped by SIGHUP"],
        ),
    ],
)
def test_sigterm_ends_a_process_with_a_message(body, status, said):
    code = f"""
import hashlib, time
from conet_jax.run import signals

signals.GRACE_SECONDS = 0.5
signals.install()
print("ready", flush=True)
try:
  {body.replace(chr(10), chr(10) + "  ")}
except KeyboardInterrupt as error:
  signals.end(error)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(status - 128)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert len(errors.splitlines()) == len(said)
    for line, fragment in zip(errors.splitlines(), said, strict=True):
        assert fragment in line


@pytest.mark.slow
@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("name", ["single", "population"])
def test_signal_ends_a_run_within_ten_seconds_and_it_goes_on_to_the_same_results(
    signum, name, tmp_path
):
    scenario = crash.scenarios(tmp_path)[name]
    longer = ["--config.epochs=40", "--config.patience=40"]
    flags = [flag for flag in scenario.flags if not re.match("--config.(epochs|patience)=", flag)]
    scenario = scenario._replace(flags=[*flags, *longer])
    with crash.Running(scenario, tmp_path / "whole") as run:
        run.finish()
    workdir = tmp_path / "stopped"
    with crash.Running(scenario, workdir) as run:
        while not list(workdir.rglob("latest/5")):
            assert run.processes[0].poll() is None
            time.sleep(0.01)
        run.processes[0].send_signal(signum)
        sent = time.monotonic()
        assert run.processes[0].wait(60) == 128 + signum
        assert time.monotonic() - sent < 10
        assert f"stopped by {signum.name}: saved after epoch" in run.printed()
    assert not list(workdir.rglob("result*/*.json")) and not (workdir / "result.json").exists()
    with crash.Running(scenario, workdir) as run:
        run.finish()
    assert crash.results(workdir) == crash.results(tmp_path / "whole")


# One owner.


def test_workdir_of_a_live_process_is_refused_and_that_of_a_dead_one_is_not(
    finished, data, tmp_path
):
    workdir = copied(finished, tmp_path)
    hold = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a+'); fcntl.flock(file, fcntl.LOCK_EX);"
        "file.truncate(0); file.write('process 7 on elsewhere'); file.flush();"
        "print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, workdir / lock.LOCK], stdout=subprocess.PIPE
    )
    try:
        holder.stdout.readline()
        before = crash.results(workdir)
        with pytest.raises(InputError, match="is in use by process 7 on elsewhere: wait"):
            fit(tiny(), workdir, dataset=data)
        assert crash.results(workdir) == before
    finally:
        holder.kill()
        holder.communicate()
    fit(tiny(), workdir, dataset=data, quiet=True)
    assert crash.results(workdir) == finished[1]


def test_sweep_study_and_figures_own_their_folders(data, tmp_path):
    config = tiny("popularity")
    plan = sweep.Sweep("tiny.py", config, {}, tmp_path, [{}])
    table = table2.Study("tiny.py", lambda variant: tiny(variant), {}, tmp_path, seeds=1, trials=1)
    (tmp_path / "popularity").mkdir()
    with lock.owned(tmp_path), lock.owned(tmp_path / "popularity"):
        own = f"is in use by process {os.getpid()} on "
        with pytest.raises(InputError, match=own):
            sweep.run(plan, data)
        with pytest.raises(InputError, match=own):
            figures.write(["3b"], {"lasso": tiny()}, tmp_path, seeds=1, dataset=data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(table2, "load_dataset", lambda config: data)
            with pytest.raises(InputError, match=f"popularity: .*{own}"):
                table2.run(table, ["popularity"])
    assert not (tmp_path / "results").exists()


def test_process_that_outlives_its_process_zero_keeps_the_workdir(tmp_path):
    with open(tmp_path / f"{lock.LOCK}.1", "w") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="in use"), lock.owned(tmp_path):
            pass
    with lock.owned(tmp_path):
        pass


def test_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def unlockable(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unlockable)
    with lock.owned(tmp_path):
        assert "cannot be locked (Operation not supported)" in capsys.readouterr().err


def test_reading_a_run_needs_no_lock(finished):
    with lock.owned(finished[0]), pytest.MonkeyPatch.context() as patch:
        load = "conet_jax.run.workdir.load_dataset"
        patch.setattr(load, lambda config: synthetic.dataset(**MEDIUM)[0])
        patch.setattr(whereabouts, "find", lambda *_: None)
        assert restore(finished[0])[2]["epoch"] == 3


# Damaged.


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def test_every_flipped_bit_of_a_checkpoint_is_noticed(finished, tmp_path):
    folder = tmp_path / "3"
    shutil.copytree(finished[0] / "checkpoints" / "latest" / "3", folder)
    assert not checkpoints.problem(folder)
    rng = random.Random(0)
    for path in files_of(folder):
        whole = path.read_bytes()
        for _ in range(20):
            at = rng.randrange(len(whole))
            flipped = bytes([whole[at] ^ 1 << rng.randrange(8)])
            path.write_bytes(whole[:at] + flipped + whole[at + 1 :])
            assert checkpoints.problem(folder), path
        path.write_bytes(whole)
        path.rename(folder / "away")
        assert path.name == "hashes.json" or "is missing" in checkpoints.problem(folder)
        (folder / "away").rename(path)
    assert not checkpoints.problem(folder)


def flip(folder):
    for path in files_of(folder):
        if path.name != "hashes.json":
            whole = bytearray(path.read_bytes())
            whole[len(whole) // 2] ^= 1
            path.write_bytes(whole)


@pytest.mark.parametrize("damage", ["flipped", "arrays gone", "hashes gone"])
def test_damaged_checkpoint_is_passed_over_for_the_one_before(
    finished, data, tmp_path, capsys, damage
):
    workdir = copied(finished, tmp_path)
    latest = workdir / "checkpoints" / "latest" / "3"
    if damage == "flipped":
        flip(latest)
    elif damage == "arrays gone":
        shutil.rmtree(latest / "state")
    else:
        (latest / "hashes.json").unlink()
    fit(tiny(), workdir, dataset=data)
    said = capsys.readouterr()
    assert said.err.startswith("warning: the checkpoint in ") and "of epoch 2" in said.err
    assert "resuming after epoch 2" in said.out
    assert crash.results(workdir) == finished[1]


def test_state_whose_best_parameters_are_damaged_is_passed_over(tmp_path, capsys):
    saved = checkpoints.Checkpoints(tmp_path)
    for epoch in (1, 2):
        saved.save_best(epoch, {"x": np.full(3, epoch)})
        saved.save_latest(epoch, {"x": np.full(3, epoch)}, {"best_epoch": epoch})
    assert saved.restore_latest({"x": np.zeros(3, int)})[1] == {"best_epoch": 2}
    flip(tmp_path / "best" / "2")
    state, progress = saved.restore_latest({"x": np.zeros(3, int)})
    assert progress == {"best_epoch": 1} and state["x"].tolist() == [1, 1, 1]
    assert "best/2 is damaged" in capsys.readouterr().err
    flip(tmp_path / "best" / "1")
    with pytest.raises(InputError, match="best/2 is damaged .* no earlier one is whole"):
        saved.restore_latest({"x": np.zeros(3, int)})
    saved.close()


def test_without_a_whole_checkpoint_there_is_one_line(finished, data, tmp_path):
    workdir = copied(finished, tmp_path)
    for epoch in (2, 3):
        flip(workdir / "checkpoints" / "latest" / str(epoch))
    with pytest.raises(InputError, match="latest/3 is damaged .* no earlier one is whole: train"):
        fit(tiny(), workdir, dataset=data)


def test_checkpoints_of_an_earlier_version_have_no_hashes_and_are_taken(finished, data, tmp_path):
    workdir = copied(finished, tmp_path)
    for path in workdir.rglob("hashes.json"):
        path.unlink()
    fit(tiny(), workdir, dataset=data, quiet=True)
    assert crash.results(workdir) == finished[1]


def test_population_whose_checkpoint_is_damaged_is_trained_again(
    data, tmp_path, monkeypatch, capsys
):
    configs = [tiny(seed=seed, epochs=2) for seed in (0, 1)]
    expected = population.train(configs, data, tmp_path / "whole")
    with monkeypatch.context() as patch:
        request(patch, call=2)
        with pytest.raises(signals.Interrupted):
            population.train(configs, data, tmp_path / "run")
    flip(tmp_path / "run" / "2" / "latest" / "1")
    found = population.train(configs, data, tmp_path / "run")
    assert "is damaged" in capsys.readouterr().err
    assert crash.without_times(found) == crash.without_times(expected)


# The disk.


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a tmpfs: a function of its options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a file system cannot be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], capture_output=True)


def newest(workdir):
    steps = (workdir / "checkpoints" / "latest").glob("[0-9]*")
    return max((int(path.name) for path in steps if path.name.isdigit()), default=0)


def test_full_disk_is_an_error_and_the_run_goes_on_once_there_is_room(finished, data, small_disk):
    reached = []
    for kilobytes in range(100, 1300, 100):
        workdir = small_disk(f"size={kilobytes}k") / "run"
        try:
            fit(tiny(), workdir, dataset=data, quiet=True)
        except (OSError, InputError) as error:
            assert "No space left on device" in str(error) and str(workdir) in str(error)
            crash.check_whole(workdir)
            reached.append(newest(workdir))
            small_disk("remount,size=50m")
            fit(tiny(), workdir, dataset=data, quiet=True)
        assert crash.results(workdir) == finished[1]
        subprocess.run(["umount", workdir.parent], check=True)
    assert 3 < len(reached) < 12 and len(set(reached)) > 1, reached


def test_workdir_that_cannot_be_written_is_an_error_and_can_be_read(data, small_disk):
    workdir = small_disk("size=50m") / "run"
    fit(tiny(epochs=1), workdir, dataset=data, quiet=True)
    small_disk("remount,ro")
    with pytest.raises(InputError, match=f"cannot write to {workdir}: Read-only file system"):
        fit(tiny(), workdir, dataset=data, quiet=True)
    with pytest.raises(InputError, match="cannot write to .*: Read-only file system"):
        fit(tiny(), workdir.parent / "other", dataset=data, quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conet_jax.run.workdir.load_dataset", lambda config: data)
        patch.setattr(whereabouts, "find", lambda *_: None)
        assert restore(workdir)[2]["epoch"] == 1
    small_disk("remount,rw")
    fit(tiny(), workdir, dataset=data, quiet=True)


@pytest.mark.parametrize("when", ["save_best", "save_latest"])
def test_workdir_that_has_gone_is_an_error(data, tmp_path, monkeypatch, when):
    workdir = tmp_path / "run"
    save = getattr(checkpoints.Checkpoints, when)

    def gone(self, *args):
        shutil.rmtree(workdir)
        save(self, *args)

    monkeypatch.setattr(checkpoints.Checkpoints, when, gone)
    with pytest.raises(FileNotFoundError, match=str(workdir)):
        fit(tiny(), workdir, dataset=data, quiet=True)


@pytest.mark.parametrize(
    ("number", "fragments"),
    [
        (errno.ENOSPC, ["runs/a/ranks.npz: No space left on device; make room", "goes on"]),
        (errno.EROFS, ["runs/a/ranks.npz: Read-only file system; take a folder"]),
        (errno.ENOENT, ["runs/a/ranks.npz: No such file or directory; it has gone"]),
    ],
)
def test_what_the_system_refuses_is_one_line_and_status_two(number, fragments):
    code = f"""
import os, sys
from conet_jax import (cli)

def main():
    raise OSError({number}, os.strerror({number}), "runs/a/ranks.npz")
cli.run(main)
"""
    assert_one_line_error(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True), *fragments
    )


@pytest.mark.slow
def test_full_disk_is_one_line_and_status_two(tmp_path, small_disk):
    scenario = crash.scenarios(tmp_path)["single"]
    for kilobytes in (100, 400, 600):
        folder = small_disk(f"size={kilobytes}k")
        done = launch("train", *scenario.flags, f"--workdir={folder / 'run'}")
        assert_one_line_error(done, "No space left on device", "make room")
        subprocess.run(["umount", folder], check=True)


# Long runs.


@pytest.mark.slow
def test_two_hundred_epochs_do_not_grow(tmp_path):
    rows = soak.soak(200, tmp_path / "run")
    (_, before, _), (_, after, still) = rows[1], rows[-1]
    assert after < before * (1 + soak.LARGEST_GROWTH), rows
    assert still <= max(files for *_, files in rows[:-1]), rows
