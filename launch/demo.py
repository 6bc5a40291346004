"""The recipe and CoNet between a ceiling and a floor, on synthetic data, in a minute or two.

python launch/demo.py [--workdir=runs/demo] [--seed=0]

The recipe starts from a linear model of both domains (ials_joined): what it adds to that is its
own; what it adds to the paper's CoNet (lasso) is mostly that start.
"""

from absl import flags

from conet_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the demo's runs.")
_SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Seed of the data and of all runs.",
    lower_bound=0,
    upper_bound=2**31 - 1,
)
_VARIANTS = {
    "recipe": "the recommended recipe",
    "ials_joined": "joined implicit ALS, linear",
    "lasso": "the paper's CoNet-lasso",
    "mlp": "the paper's MLP, target only",
    "popularity": "the floor",
}
_CEILING = "oracle: the ceiling"


def main() -> None:
    """Trains the variants and prints them under the oracle, who knows all true preferences."""
    from pathlib import Path

    import numpy as np

    from conet_jax.data import synthetic
    from conet_jax.metrics import in_tables
    from conet_jax.run.fit import fit
    from conet_jax.train import ranking

    config_of = cli.load_config_file(Path(__file__).resolve().parent.parent / "configs/demo.py")
    rows = {}
    for variant, what in _VARIANTS.items():
        config = config_of.get_config(variant)
        config.seed = config.data.synthetic.seed = _SEED.value
        result = fit(config, Path(_WORKDIR.value) / variant)
        rows[f"{variant}: {what}"] = result["test_warm"]

    dataset, oracle = synthetic.dataset(**config.data.synthetic.to_dict())
    test = dataset.test
    listed = np.concatenate([test.items[:, None], test.candidates], axis=1)
    known = ranking.rank_scores(oracle(test.users, listed), test.mask)
    rows = {_CEILING: ranking.summarize(known, k=config.eval_k[0])} | rows
    keys = [metric.key(config.eval_k[0]) for metric in in_tables()]
    width = max(map(len, rows))
    print(f"test split, {len(test.users):,} users, one item among {listed.shape[1]}")
    print(f"{'':{width}}" + "".join(f"{key:>14}" for key in keys))
    for name, metrics in sorted(rows.items(), key=lambda row: -row[1][keys[1]]):
        print(f"{name:{width}}" + "".join(f"{metrics[key]:14.4f}" for key in keys))


if __name__ == "__main__":
    cli.run(main)
