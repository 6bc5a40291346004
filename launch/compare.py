"""Compares finished runs on the same data: config fields that differ, metrics, paired tests.

python launch/compare.py DIR DIR ... [--split=test_warm|test|valid_warm|valid] [--k=10]

Runs that differ in the seed alone are one row.
"""

from absl import flags

from conet_jax import cli
from conet_jax.errors import InputError

_SPLIT = flags.DEFINE_enum(
    "split",
    "test_warm",
    ["test_warm", "test", "valid_warm", "valid"],
    "Held-out items to compare on; warm are those with a training pair.",
)
_K = flags.DEFINE_integer(
    "k",
    None,
    "Cut of HR, NDCG and MRR, in items; by default the first of the first run's config.eval_k.",
    lower_bound=1,
)


def main(workdirs: list[str]) -> None:
    """Prints the comparison."""
    if not workdirs:
        raise InputError("name the folders of runs: python launch/compare.py runs/a runs/b")
    from conet_jax.studies import compare

    print(compare.report(workdirs, split=_SPLIT.value, k=_K.value))


if __name__ == "__main__":
    cli.run(main, arguments=True)
