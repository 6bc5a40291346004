"""Draws the figures of the paper on one pair of domains, with their numbers as CSV.

python launch/figures.py --config=configs/NAME.py[:variant] --workdir=DIR \
    --figure=2a|2b|3a|3b|3c|3d|sparsity|all [--seeds=3] [--methods=conet,lasso] [--config.field=...]

2a target weight, 2b number of crossed layers (2c and 2d are these on the paper's other data), 3a
lasso penalty, 3b training loss and metric by epoch, 3c time and 3d quality by negatives per
positive, sparsity of H by epoch. Without a variant the lines are the paper's CoNet and CoNet-lasso;
a variant after the colon is one line; --methods names any. Every metric is of the validation
split. Interrupted, the same command goes on.
"""

from absl import flags
from ml_collections import config_flags

from conet_jax import cli

_FIGURES = ("2a", "2b", "3a", "3b", "3c", "3d", "sparsity")
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with a variant after a colon: configs/douban.py:low_rank; required. "
    "Its fields are set by --config.FIELD=VALUE; conet_jax/config.py has them all, with defaults.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the figures; required.", required=True)
_FIGURE = flags.DEFINE_enum("figure", "all", [*_FIGURES, "all"], "The figure to draw.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs a point, from config.seed on.", lower_bound=1)
_METHODS = flags.DEFINE_list(
    "methods",
    None,
    "Variants to draw a line of; by default conet,lasso. Config fields of the command line hold "
    "for all.",
)


def _configs() -> dict:
    """Configs by line, each the file's own of that variant under the command line's fields."""
    from conet_jax.errors import InputError

    file = cli.config_file(_CONFIG)
    methods = list(_METHODS.value or ())
    if _METHODS.value == []:
        raise InputError("--methods names none: leave it out for conet,lasso")
    if file.variant and methods:
        raise InputError(
            f"--config names the variant {file.variant!r}: leave it out beside --methods"
        )
    methods = methods or ([file.variant] if file.variant else ["conet", "lasso"])
    configs = {}
    for method in methods:
        config = file.get_config(method)
        config.update_from_flattened_dict(file.given)
        configs[method] = config
    return configs


def main() -> None:
    """Draws."""
    configs = _configs()
    cli.choose_platform(next(iter(configs.values())))
    from conet_jax.studies import figures

    names = _FIGURES if _FIGURE.value == "all" else (_FIGURE.value,)
    figures.write(names, configs, _WORKDIR.value, seeds=_SEEDS.value)


if __name__ == "__main__":
    cli.run(main)
