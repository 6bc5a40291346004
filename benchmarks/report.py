"""Named figures, ratios and rates; as JSON and as a table."""

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from conet_jax.run.fit import versions


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


def as_json(report: Report, scale: str) -> dict[str, Any]:
    """Returns a report as ``launch/benchmark.py`` writes it.

    Returns:
      {"machine": …, "results": […], "ratios": {…}, "rates": {…}}.
    """
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


def table(report: dict[str, Any]) -> str:
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
