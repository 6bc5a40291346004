"""``launch/prepare.py`` on files of the size of the paper's, in a process of its own."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.report import Report

RAW_LINES = (22_507_155, 4_607_047)  # of the paper's two files, ratings_Books and _Movies_and_TV


def measure(report: Report, scale: str) -> None:
    """Times it, and takes its peak memory; under "small" on a hundredth of the lines."""
    fraction, core = (0.01, 1) if scale == "small" else (1.0, 5)
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("books.csv", "movies.csv")]
        known = max(1, int(8_000_000 * fraction))
        for seed, (path, count, items) in enumerate(
            zip(paths, RAW_LINES, (2_300_000, 200_000), strict=True)
        ):
            size = int(count * fraction)
            write_raw(path, size, seed=seed, users=known, items=max(5_000, int(items * fraction)))
        total = sum(int(count * fraction) for count in RAW_LINES)
        for users, suffix in (("shared", ""), ("all", "_all_users")):
            command = [
                sys.executable,
                str(root / "launch" / "prepare.py"),
                f"--target={paths[0]}",
                f"--source={paths[1]}",
                f"--min_user_items={core}",
                f"--min_item_users={core}",
                f"--users={users}",
                f"--out={Path(folder) / users}",
            ]
            began = time.perf_counter()
            usage = _usage_of(command)
            seconds = time.perf_counter() - began
            report.results.append(
                {
                    "name": f"prepare_raw_lines{suffix}",
                    "seconds": seconds / total,
                    "cpu_seconds": (usage.ru_utime + usage.ru_stime) / total,
                    "runs": [seconds],
                    "items_per_second": total / seconds,
                }
            )
            report.rates[f"prepare_seconds{suffix}"] = seconds
            report.rates[f"prepare_peak_gib{suffix}"] = 1024 * usage.ru_maxrss / 2**30


def _usage_of(command: list[str]) -> resource.struct_rusage:
    """Runs a command and returns what this one process, of all children, has used."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            errors.seek(0)
            raise RuntimeError(f"prepare failed: {errors.read().decode(errors='replace')}")
    return usage


def write_raw(path: Path, lines: int, *, seed: int, users: int, items: int) -> None:
    """Writes a raw Amazon ratings file: user,item,rating,timestamp, skewed, without a header.

    Args:
      path: the file.
      lines: its length.
      seed: of the draw.
      users: distinct user ids at most; both files of a pair draw from the same.
      items: distinct item ids at most.
    """
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
