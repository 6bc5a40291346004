"""CoNet beside its floor and its ceiling, on synthetic data, in a minute or two.

python launch/demo.py [--workdir=runs/demo] [--seed=0]
"""

from absl import flags

from conet_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the demo's two runs.")
_SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Seed of the data and of both runs.",
    lower_bound=0,
    upper_bound=2**31 - 1,
)


def main() -> None:
    """Trains the MLP and CoNet-lasso and prints them between popularity and the oracle."""
    import importlib.util
    from pathlib import Path

    import numpy as np

    from conet_jax.data import synthetic
    from conet_jax.run.fit import fit
    from conet_jax.train import ranking

    path = Path(__file__).resolve().parent.parent / "configs" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    results = {}
    for name, variant in (("mlp", "mlp"), ("conet", "")):
        config = module.get_config(variant)
        config.seed = config.data.synthetic.seed = _SEED.value
        results[name] = fit(config, Path(_WORKDIR.value) / name)

    dataset, oracle = synthetic.dataset(**config.data.synthetic.to_dict())
    test = dataset.test
    listed = np.concatenate([test.items[:, None], test.candidates], axis=1)
    counts = np.bincount(dataset.target.indices, minlength=dataset.target.num_items)
    rows = [("popularity (floor)", counts[listed].astype(float)), ("oracle (ceiling)", None)]
    rows[1] = ("oracle (ceiling)", oracle(test.users, listed))
    bounds = {
        name: ranking.summarize(ranking.rank_scores(scores, test.mask), k=config.eval_k)
        for name, scores in rows
    }
    table = [
        ("oracle (ceiling)", bounds["oracle (ceiling)"]),
        ("CoNet-lasso", results["conet"]["test"]),
        ("MLP, target only", results["mlp"]["test"]),
        ("popularity (floor)", bounds["popularity (floor)"]),
    ]
    keys = [f"{metric}@{config.eval_k}" for metric in ("hit_ratio", "ndcg", "mrr")]
    print(f"test split, {len(test.users):,} users, one item among {listed.shape[1]}")
    print(f"{'':20}" + "".join(f"{key:>14}" for key in keys))
    for name, metrics in table:
        print(f"{name:20}" + "".join(f"{metrics[key]:14.4f}" for key in keys))


if __name__ == "__main__":
    cli.run(main)
