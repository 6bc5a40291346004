"""Kills runs of configs/demo.py with SIGKILL in every phase and lets them go on.

python tests/crash.py [--kills=100] [--seed=0] [--chain=1] [--jobs=1] [--kinds=single,...]
    [--workdir=DIR]

60% of the kills are of a single process, 20% of a population (launch/sweep.py), 20% of two
processes on loopback; a tenth as many again are of launch/prepare.py. A killed run says, through a
pipe, which phase it has come to; when it comes to the one that is to be hit, it is killed after a
random part of the time that the phase took undisturbed. What it left is read: no file may be half
written. The run that goes on is killed, too, --chain times in all; then the plain command runs to
its end, and its results must be those of an undisturbed run, bit for bit but for times. Exits with
status 1 at the first difference.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("start", "data preparation", "epoch", "validation", "checkpoint", "result writing")
SMALL = {
    "data.synthetic.num_users": 300,
    "data.synthetic.num_target_items": 150,
    "data.synthetic.num_source_items": 160,
    "data.synthetic.target_interactions": 1_800,
    "data.synthetic.source_interactions": 6_000,
    "layers": "(16,8)",
    "cross_layers": 1,
    "epochs": 6,
    "patience": 6,
}
TINY = SMALL | {"layers": "(8,4)", "cross_layers": 0, "epochs": 3, "patience": 3}


# In the process that is killed.


def child(fd, script):
    """Runs a launcher that says what it is at: "> phase" begins, "<" ends, "= phase" stays."""
    from conet_jax import cli

    def say(text):
        os.write(fd, f"{text}\n".encode())

    def told(owner, name, phase, after=None):
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            say(f"> {phase}")
            try:
                return function(*args, **kwargs)
            finally:
                say("<")
                if after:
                    say(f"= {after}")

        setattr(owner, name, wrapped)

    def instrument():
        from conet_jax.run import fit, loop
        from conet_jax.run.checkpoints import Checkpoints
        from conet_jax.studies import population

        told(fit, "load_for", "data preparation")
        told(loop, "run_epoch", "epoch", after="epoch")
        told(loop, "end_epoch", "validation")
        told(fit, "_finish", "result writing", after="result writing")
        told(population, "_epoch", "epoch", after="epoch")
        told(population, "train", "start", after="result writing")
        told(Checkpoints, "save_latest", "checkpoint")
        told(Checkpoints, "save_best", "checkpoint")

    if script.endswith("prepare.py"):
        from conet_jax.data import build, store

        told(build, "build", "data preparation")
        told(store, "save", "result writing", after="result writing")
    else:
        # After the processes have joined, before anything that is told about is used.
        choose = cli.choose_platform
        cli.choose_platform = lambda config: (choose(config), instrument())
    code = compile(Path(script).read_text(), script, "exec")
    exec(code, {"__name__": "__main__", "__file__": script})


class Phases:
    """Follows what a child says: its phase, and how many times it has changed.

    A phase that begins inside another is over with it; ``mark`` is (phase, how many before).
    """

    def __init__(self, fd):
        self._fd, self._rest = fd, b""
        self._open, self._base, self._seen = [], "start", collections.Counter()
        self.marks = []  # (phase, its number, time)
        self._enter("start")

    @property
    def phase(self):
        return self._open[-1] if self._open else self._base

    def _enter(self, phase):
        self.marks.append((phase, self._seen[phase], time.monotonic()))
        self._seen[phase] += 1

    def read(self, timeout):
        """Waits for news; returns whether the child still has the pipe."""
        if not select.select([self._fd], [], [], timeout)[0]:
            return True
        data = os.read(self._fd, 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            before = self.phase
            kind, _, phase = line.decode().partition(" ")
            if kind == ">":
                self._open.append(phase)
            elif kind == "<":
                self._open.pop()
            else:
                self._base = phase
            if self.phase != before:
                self._enter(self.phase)
        return bool(data)


# Runs.


class Scenario(NamedTuple):
    """A kind of run.

    Attributes:
      name: of it.
      script: launcher.
      flags: its flags but for the workdir.
      processes: of one run.
      folder: flag that names the workdir.
      environment: variables of its own.
    """

    name: str
    script: str
    flags: list
    processes: int = 1
    folder: str = "workdir"
    environment: dict = {}


def config_flags(variant, fields):
    return [
        f"--config={ROOT / 'configs' / 'demo.py'}{variant}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def scenarios(root):
    trained = config_flags(":lasso", SMALL | {"learning_rate": 0.01})
    for name in ("books", "movies"):
        rng = np.random.default_rng(len(name))
        rows = {(u, i) for u in range(400) for i in rng.integers(0, 120, 12).tolist()}
        text = "".join(f"{u},{i},5\n" for u, i in sorted(rows))
        (root / f"{name}.csv").write_text("user_id,item_id,rating\n" + text)
    files = [f"--target={root / 'books.csv'}", f"--source={root / 'movies.csv'}"]
    return {
        "single": Scenario("single", "train", trained),
        "recipe": Scenario("recipe", "train", config_flags(":recipe", SMALL)),
        "population": Scenario(
            "population", "sweep", [*trained, "--grid=config.l1=0,1e-3", "--seeds=2"]
        ),
        # JAX keeps no program of several processes, and compiles it with each start.
        "processes": Scenario(
            "processes",
            "train",
            config_flags(":conet", TINY),
            processes=2,
            environment={"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        ),
        "prepare": Scenario("prepare", "prepare", files, folder="out"),
        "tiny": Scenario("tiny", "train", config_flags(":mlp", TINY)),
    }


def environment():
    env = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return os.environ | env


class Running(contextlib.ExitStack):
    """The processes of one run; with ``told`` they say their phases."""

    def __init__(self, scenario, workdir, told=False):
        super().__init__()
        script = str(ROOT / "launch" / f"{scenario.script}.py")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.log = self.enter_context(open(workdir.with_name(f"{workdir.name}.log"), "w+"))
        self.processes, self.phases = [], []
        for number in range(scenario.processes):
            flags = [*scenario.flags, f"--{scenario.folder}={workdir}"]
            if scenario.processes > 1:
                flags.append(f"--coordinator=localhost:{port}")
                flags += [f"--num_processes={scenario.processes}", f"--process_id={number}"]
            head, fds = [script], ()
            if told:
                read, write = os.pipe()
                head, fds = [str(Path(__file__)), "--child", str(write), script], (write,)
            process = subprocess.Popen(
                [sys.executable, *head, *flags],
                stdout=self.log,
                stderr=subprocess.STDOUT,
                env=environment() | scenario.environment,
                pass_fds=fds,
                cwd=ROOT,
            )
            self.callback(process.wait)
            self.callback(process.kill)
            self.processes.append(process)
            if told:
                os.close(write)
                self.callback(os.close, read)
                self.phases.append(Phases(read))

    def finish(self, timeout=1800):
        """Waits for all processes.

        Raises:
          AssertionError: one did not end with status 0.
        """
        for process in self.processes:
            code = process.wait(timeout)
            assert code == 0, f"status {code}: {self.printed()}"

    def printed(self):
        self.log.flush()
        return Path(self.log.name).read_text()[-3000:]


def undisturbed(scenario, workdir):
    """Returns {(phase, number): seconds} of process 0 of a whole run."""
    with Running(scenario, workdir, told=True) as run:
        phases = run.phases[0]
        while phases.read(600):
            pass
        ended = time.monotonic()
        run.finish()
    ends = [at for *_, at in phases.marks[1:]] + [ended]
    return {
        (phase, number): end - at
        for (phase, number, at), end in zip(phases.marks, ends, strict=True)
    }


def killed(scenario, workdir, spans, phase, rng):
    """Kills a run in a phase; returns the phase that it was in, or None if it had ended."""
    numbers = [number for name, number in spans if name == phase]
    number = 0 if workdir.exists() else rng.choice(numbers)  # one that goes on has fewer to come
    delay = rng.random() * spans[phase, number]
    with Running(scenario, workdir, told=True) as run:
        at = rng.randrange(scenario.processes)
        victim, phases = run.processes[at], run.phases[at]
        everyone = rng.random() < 0.5  # a machine that goes down, or one of its processes
        came = None
        while came is None and phases.read(600):
            came = next((t for p, n, t in phases.marks if (p, n) == (phase, number)), None)
        while came is not None and (left := came + delay - time.monotonic()) > 0:
            if not phases.read(left):
                break
        if victim.poll() is not None:
            run.finish()
            return None
        for process in run.processes if everyone else [victim]:
            process.send_signal(signal.SIGKILL)
        while phases.read(600):
            pass
        if scenario.processes > 1:
            for process in run.processes:  # those that are left notice, and end by themselves
                process.wait(90)
        # It may have come to its end between the look and the kill.
        return phases.phase if victim.wait() == -signal.SIGKILL else None


# What they leave.


def check_whole(workdir):
    """Reads every file that stands at its place; what is beside its place has another name.

    Raises:
      Exception: one cannot be read to its end.
    """
    from conet_jax.data import store
    from conet_jax.run import checkpoints

    for path in workdir.rglob("*"):
        inside = {"checkpoints", "populations"} & set(path.relative_to(workdir).parts)
        if not path.is_file() or path.name.startswith(".") or inside:
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1)), path
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                assert all(arrays[name] is not None for name in arrays)
        elif path.suffix in (".md", ".csv"):
            assert path.read_text().endswith("\n"), path
    if (workdir / "dataset.json").exists():
        store.load(workdir)
    for latest in workdir.rglob("latest"):
        steps = sorted(int(path.name) for path in latest.iterdir() if path.name.isdigit())
        for step in steps[-1:]:  # one before may be half deleted
            folder = latest / str(step)
            if (folder / "hashes.json").exists():
                assert not (problem := checkpoints.problem(folder)), (folder, problem)


_TIMES = ("seconds", "rows_per_second", "target_loss_seconds")


def results(workdir):
    """Returns all that a run leaves for others by file, without times and checkpoints."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = path.relative_to(workdir).as_posix()
        if not path.is_file() or name.startswith(("checkpoints", "populations", ".lock")):
            continue
        if path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            rows = map(json.loads, path.read_text().splitlines())
            found[name] = [without_times(row) for row in rows]
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found[name] = {key: arrays[key].tobytes() for key in arrays}
        elif path.suffix == ".csv":
            lines = [line.split(",") for line in path.read_text().splitlines()]
            at = lines[0].index("seconds")
            found[name] = [line[:at] + line[at + 1 :] for line in lines]
        elif path.suffix == ".md":
            found[name] = "is there"  # has seconds, or the workdir's name; made of the others
        else:
            found[name] = path.read_bytes()
    return found


def without_times(value):
    if isinstance(value, list):
        return [without_times(x) for x in value]
    if isinstance(value, dict):
        return {name: without_times(x) for name, x in value.items() if name not in _TIMES}
    return value


def run(scenario, kills, seed, root, chain=1, say=lambda line: None):
    """Kills and resumes; returns a Counter of kills by phase.

    Raises:
      AssertionError: a run did not come to the same results, or a file was half written.
    """
    rng = random.Random(f"{seed} {scenario.name}")
    root = root / f"{scenario.name}-{seed}"
    root.mkdir()
    whole = root / "whole"
    with Running(scenario, whole) as plain:
        plain.finish()
    expected = results(whole)
    told = root / "told"
    spans = undisturbed(scenario, told)
    assert results(told) == expected, "two undisturbed runs differ"
    wanted = [phase for phase in PHASES if any(name == phase for name, _ in spans)]
    counts, tries = collections.Counter(), 0
    while counts.total() < kills:
        workdir, hits, began = root / f"killed-{tries}", [], time.monotonic()
        while len(hits) < min(chain, kills - counts.total()):
            tries += 1
            hit = killed(scenario, workdir, spans, wanted[tries % len(wanted)], rng)
            if hit is None:
                break
            check_whole(workdir)
            hits.append(hit)
        with Running(scenario, workdir) as again:
            again.finish()
            found = results(workdir)
            for name in expected.keys() | found.keys():
                assert found.get(name) == expected.get(name), (workdir, name, again.printed())
        shutil.rmtree(workdir)
        counts.update(hits)
        seconds = time.monotonic() - began
        text = ", ".join(hits) or "nothing"
        say(f"{scenario.name} {counts.total()}/{kills}: killed in {text}; same ({seconds:.0f} s)")
    return counts


def table(counts):
    """Returns kills by scenario and phase as a Markdown table."""
    lines = [f"| kills in | {' | '.join(PHASES)} | all |", "| --- |" + " ---: |" * 7]
    for name, found in counts.items():
        cells = [str(found[phase]) for phase in PHASES]
        lines.append(f"| {name} | {' | '.join(cells)} | {found.total()} |")
    return "\n".join(lines)


def say(line):
    print(time.strftime("%H:%M:%S"), line, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chain", type=int, default=1, help="kills of a run before it may end")
    parser.add_argument("--kinds", default="", help="kinds of run, by default all")
    parser.add_argument("--jobs", type=int, default=1, help="kinds of run at a time")
    parser.add_argument("--workdir", type=Path, default=None, help="kept if a run fails")
    args = parser.parse_args()
    root = (args.workdir or Path(tempfile.mkdtemp(prefix="conet_jax-crash-"))).absolute()
    root.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "compiled"))
    each = args.kills // 5
    shares = [("processes", each), ("population", each), ("recipe", each // 2)]
    single = args.kills - sum(kills for _, kills in shares)
    shares += [("single", single // 2), ("single", single - single // 2)]
    shares += [("prepare", args.kills // 10)]
    asked = args.kinds.split(",") if args.kinds else [name for name, _ in shares]
    shares = [(name, kills) for name, kills in shares if name in asked]
    kinds = scenarios(root)
    began = time.monotonic()
    counts = collections.defaultdict(collections.Counter)
    with ThreadPoolExecutor(args.jobs) as pool:
        running = [
            pool.submit(run, kinds[name], kills, f"{args.seed}.{part}", root, args.chain, say)
            for part, (name, kills) in enumerate(shares)
        ]
        for (name, _), future in zip(shares, running, strict=True):
            if future.exception() is None:
                counts[name] += future.result()
            else:
                say(f"{name} failed: {future.exception()!r}")
    print(table(counts))
    survived = sum(found.total() for found in counts.values())
    wanted = sum(kills for _, kills in shares)
    minutes = (time.monotonic() - began) / 60
    print(f"{survived} of {wanted} kills resumed to the same results, in {minutes:.0f} min")
    if survived < wanted:
        sys.exit(1)
    if args.workdir is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        descriptor, launcher = int(sys.argv[2]), sys.argv[3]
        sys.argv = sys.argv[3:]
        child(descriptor, launcher)
    else:
        main()
