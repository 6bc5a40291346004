"""A guard for changes that must not change results: records runs of one tree, compares another's.

    python tests/guard.py record DIR [--tree=CHECKOUT]   trains, and keeps what came of it in DIR
    python tests/guard.py check DIR [--tree=CHECKOUT]    trains again, and says what differs

A change that only moves, renames or tidies leaves every number as it is, bit for bit, on one
machine: rows of metrics.jsonl, result.json and ranks.npz, without times, versions and config.
What a run has beyond the record (a new metric) is no difference.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
_CONFIG = "--config=configs/demo.py"
_FEW = "--config.epochs=3"
# By name: what is typed after `python launch/NAME.py`, and the variables of its environment.
RUNS: dict[str, tuple[str, list[str], dict[str, str]]] = {
    "recipe": ("train", [f"{_CONFIG}:recipe"], {}),
    "mlp": ("train", [f"{_CONFIG}:mlp"], {}),
    "conet": ("train", [f"{_CONFIG}:conet", _FEW], {}),
    "lasso": ("train", [f"{_CONFIG}:lasso", _FEW], {}),
    "published": ("train", [f"{_CONFIG}:published", _FEW], {}),
    "cross_stitch": ("train", [f"{_CONFIG}:cross_stitch", _FEW], {}),
    "ials": ("train", [f"{_CONFIG}:ials", _FEW], {}),
    "fm": ("train", [f"{_CONFIG}:fm", _FEW], {}),
    "cmf": ("train", [f"{_CONFIG}:cmf", _FEW], {}),
    "two_devices": (
        "train",
        [f"{_CONFIG}:lasso", "--config.epochs=2"],
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    ),
    "sweep": (
        "sweep",
        [f"{_CONFIG}:lasso", "--config.epochs=2", "--grid=config.l1=0,1e-4", "--seeds=2"],
        {},
    ),
}
_TIMES = ("seconds", "rows_per_second", "config", "versions", "jax_settings")


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in _TIMES}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def _numbers_of(workdir: Path) -> dict[str, Any]:
    """What a run or a sweep has left that must not change."""
    if (workdir / "sweep.csv").exists():
        with open(workdir / "sweep.csv", newline="") as file:
            rows = [_without_times(row) for row in csv.DictReader(file)]
        return {"sweep": sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))}
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    with np.load(workdir / "ranks.npz") as file:
        ranks = {name: file[name].tolist() for name in file.files}
    return {
        "metrics": [_without_times(json.loads(line)) for line in lines],
        "result": _without_times(json.loads((workdir / "result.json").read_text())),
        "ranks": ranks,
    }


def _run(name: str, tree: Path) -> dict[str, Any]:
    launcher, arguments, environment = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, f"launch/{launcher}.py", *arguments, f"--workdir={folder}/run"]
        environment = {**os.environ, **environment, "PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return _numbers_of(Path(folder) / "run")


def differences(recorded: Any, found: Any, path: str = "") -> list[str]:
    """Returns the paths at which what was recorded is missing or has another value."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        lists = [
            differences(value, found.get(key), f"{path}/{key}") for key, value in recorded.items()
        ]
        return [line for lines in lists for line in lines]
    if isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        lists = [
            differences(*both, f"{path}/{at}")
            for at, both in enumerate(zip(recorded, found, strict=True))
        ]
        return [line for lines in lists for line in lines]
    return [] if recorded == found else [f"{path}: {recorded!r:.60} was, {found!r:.60} is"]


def main() -> None:
    """Records or checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--only", default=",".join(RUNS))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in args.only.split(","):
        path = args.folder / f"{name}.json"
        found = _run(name, args.tree.resolve())
        if args.what == "record":
            path.write_text(json.dumps(found))
            print(f"{name}: recorded", flush=True)
            continue
        wrong = differences(json.loads(path.read_text()), found)
        failed |= bool(wrong)
        print(
            f"{name}: " + (f"{len(wrong)} differ" if wrong else "the same"), *wrong[:5], sep="\n  "
        )
        sys.stdout.flush()
    sys.exit(failed)


if __name__ == "__main__":
    main()
