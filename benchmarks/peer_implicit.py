"""``implicit`` on pairs from a file, in its own environment: a line in, the work, a line out."""

import sys

import numpy as np
from scipy import sparse


def main(path: str, factors: int, regularization: float, alpha: float) -> None:
    """Answers "sweep" and "lists N" until the end of the input; lists are of the first items."""
    from implicit.als import AlternatingLeastSquares  # not there where this file is only imported

    given = np.load(path)
    pairs = given["users"], given["items"]
    confidence = np.full(len(pairs[0]), 1 + alpha, np.float32)
    by_user = sparse.csr_matrix((confidence, pairs), shape=tuple(given["shape"]))
    by_item, listed = by_user.T.tocsr(), int(given["listed"])
    model = AlternatingLeastSquares(
        factors=factors, regularization=regularization, use_cg=True, use_gpu=False, iterations=1
    )
    model.fit(by_user, show_progress=False)
    x, y = model.user_factors, model.item_factors
    model.item_factors, seen = y[:listed].copy(), by_user[:, :listed]
    print("ready", flush=True)
    for line in sys.stdin:
        name, *count = line.split()
        if name == "sweep":
            model.solver(by_user, x, y, regularization, num_threads=0)
            model.solver(by_item, y, x, regularization, num_threads=0)
        else:
            users = np.arange(int(count[0]))
            model.recommend(users, seen[users], N=10)
        print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
