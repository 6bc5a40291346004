"""Times what this project claims to be fast, each claim as a ratio of two things in one run.

python launch/benchmark.py \
    [--suite=all|train|evaluate|recommend|prepare|population|run|scaling|peers] \
    [--scale=amazon|mobile|small] [--json=FILE]

Synthetic data with the counts of the paper's Table 1. A figure is the median of repeated runs after
a warm-up, variants in turn in one process. Machines are noisy: compare ratios, not seconds.
"""

import sys
from pathlib import Path

from absl import flags

from conet_jax import cli

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import suites  # noqa: E402

_SUITE = flags.DEFINE_enum(
    "suite",
    "all",
    ["all", *suites.SUITES, *suites.OTHERS],
    "What to time; not part of all: run, a whole training run of 30 epochs; scaling, several "
    "devices, on a CPU those that JAX makes of it; peers, beside another library.",
)
_SCALE = flags.DEFINE_enum(
    "scale", "amazon", list(suites.SCALES), "Sizes: a data set of Table 1, or small."
)
_JSON = flags.DEFINE_string(
    "json", None, "File to write the results to, besides the table; by default none."
)
_RUNS = flags.DEFINE_integer(
    "runs", 5, "Timed runs of each variant, after a warm-up.", lower_bound=1
)


def main() -> None:
    """Runs the suites, prints a table, writes the JSON."""
    names = suites.SUITES if _SUITE.value == "all" else (_SUITE.value,)
    measured = suites.run(names, scale=_SCALE.value, runs=_RUNS.value)
    from benchmarks import report

    print(report.table(measured))
    if _JSON.value:
        from conet_jax.files import write_json

        write_json(Path(_JSON.value), measured)
        print(f"written to {_JSON.value}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
