"""The suites by name; each is a module with ``measure(report, scale)``."""

import importlib
import sys
from typing import Any

# Those of ``all``, in this order: the first forks while this process is small.
SUITES = ("prepare", "train", "evaluate", "recommend", "population")
OTHERS = ("run", "scaling", "peers")  # these take long, other devices, or another library
SCALES = ("amazon", "mobile", "small")  # of ``data.SCALES``


def run(suites: tuple[str, ...], *, scale: str, runs: int) -> dict[str, Any]:
    """Runs suites and returns the report.

    Args:
      suites: of ``SUITES`` and ``OTHERS``.
      scale: of ``SCALES``.
      runs: timed runs of each variant.

    Returns:
      See ``report.as_json``.
    """
    from benchmarks.report import Report, as_json

    report = Report(runs)
    if "scaling" in suites:
        import jax

        from benchmarks.scaling import DEVICES

        jax.config.update("jax_num_cpu_devices", max(DEVICES))
    for suite in suites:
        print(suite, file=sys.stderr, flush=True)
        importlib.import_module(f"benchmarks.{suite}").measure(report, scale)
    return as_json(report, scale)
