"""Beside ``implicit`` (Frederickson), in an environment of its own, in turn with ours.

A sweep of implicit ALS by three steps of conjugate gradients, 64 factors, both domains' pairs; and
lists of ten: of its factors, and of our recipe.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from benchmarks import data, recommend
from benchmarks.report import Report
from conet_jax import cli
from conet_jax.models import ials
from conet_jax.models.base import Sizes
from conet_jax.serve import recommend as serving

IMPLICIT = "implicit==0.7.3"
FACTORS, REGULARIZATION, ALPHA, USERS = 64, 200.0, 50.0, 4_096


def measure(report: Report, scale: str) -> None:
    """Times both in turn."""
    dataset = data.dataset(scale)
    ours = recommend.shortlisted(scale)
    pairs = ours.interactions
    sizes = Sizes(dataset.num_users, dataset.target.num_items, dataset.source.num_items)
    options = ials.Options((2 * FACTORS,), True, REGULARIZATION, ALPHA)
    matrix = ials.matrix(pairs, sizes, joined=True)
    tables = ials.init(jax.random.key(0), sizes, options).tables
    users = serving.find_users(ours, dataset.user_ids[:USERS])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.npz"
        shape = sizes.users, sizes.target_items + sizes.source_items
        items = np.concatenate([pairs["target"].items, sizes.target_items + pairs["source"].items])
        owners = np.concatenate([pairs["target"].users, pairs["source"].users])
        np.savez(path, users=owners, items=items, shape=shape, listed=sizes.target_items)
        given = (str(path), str(FACTORS), str(REGULARIZATION), str(ALPHA))
        with _Peer("peer_implicit.py", *given) as peer:
            seconds = report.time(
                {
                    "ials_sweep": (
                        lambda: jax.block_until_ready(ials.sweep(matrix, tables, options)),
                        1,
                    ),
                    "implicit_sweep": (lambda: peer.ask("sweep"), 1),
                    "recommend_users": (lambda: list(serving.stream(ours, users)), len(users)),
                    "implicit_lists": (lambda: peer.ask(f"lists {len(users)}"), len(users)),
                }
            )
    report.ratios["ials_sweep_over_implicit"] = seconds["ials_sweep"] / seconds["implicit_sweep"]
    report.ratios["recommend_over_implicit"] = (
        seconds["recommend_users"] / seconds["implicit_lists"]
    )
    report.rates["recommend_users_per_second"] = 1 / seconds["recommend_users"]
    report.rates["implicit_users_per_second"] = 1 / seconds["implicit_lists"]


class _Peer:
    """A worker of another library."""

    def __init__(self, script: str, *arguments: str) -> None:
        path = Path(__file__).with_name(script)
        # Its own threads alone: those of its BLAS beside them cost it half of its speed.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [_environment(), str(path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._wait()

    def __enter__(self) -> "_Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def ask(self, line: str) -> None:
        """Has it done."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        self._wait()

    def _wait(self) -> None:
        if not self.process.stdout.readline():
            raise RuntimeError(f"the peer ended with status {self.process.wait()}")


def _environment() -> str:
    """A Python that has the peer, made when first asked for."""
    folder = Path(cli.cache_folder()) / "peers" / IMPLICIT.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", IMPLICIT], check=True)
        (folder / "made").touch()
    return str(python)
