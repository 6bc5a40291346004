"""Our ranker on somebody else's scores: metrics with ties by expectation, in NumPy alone.

python examples/rank_other_scores.py
"""

import numpy as np

from conet_jax.train.ranking import rank_scores, summarize

rng = np.random.default_rng(0)
users, candidates = 1_000, 99
# Column 0 is the held-out item; the others are its candidates.
scores = {
    "random": rng.random((users, 1 + candidates)),
    "constant": np.zeros((users, 1 + candidates)),
    "three grades": rng.integers(0, 3, (users, 1 + candidates)) + 1.0 * (np.arange(100) == 0),
}
counts = np.ones((users, candidates), bool)  # False where a candidate does not count
for name, values in scores.items():
    metrics = summarize(rank_scores(values, counts), k=10)
    print(f"{name:13} HR@10 {metrics['hit_ratio@10']:.4f}  AUC {metrics['auc']:.4f}")
