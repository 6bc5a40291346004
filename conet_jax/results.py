"""What a finished run has left, read back: result.json and ranks.npz."""

from pathlib import Path
from typing import Any

import numpy as np

from conet_jax import files
from conet_jax.evaluation import Ranks


def read_result(path: Path) -> dict[str, Any]:
    """Returns the contents of a run's result.json.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is damaged, or no result.
    """
    result = files.read_json(path)
    try:
        numbers = [result[name] for name in ("epochs", "best_epoch", "parameters", "seconds")]
        numbers += [x for split in ("test", "valid") for x in result[split].values()]
        if not all(type(x) in (int, float) for x in numbers):
            raise TypeError("a number is something else")
        if not (type(result["dataset"]["hash"]) is str and type(result["config"]) is dict):
            raise TypeError("a field is of another type")
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"no result of a run: {error!r}") from None
    return result


def read_ranks(path: Path, split: str) -> tuple[np.ndarray, Ranks]:
    """Returns users and ranks of a split, "test" or "valid", from a run's ranks.npz.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is damaged, or the arrays are no ranks.
    """
    users, *arrays = files.read_arrays(path, [f"{split}_{x}" for x in ("users", *Ranks._fields)])
    for values in (users, *arrays):
        if values.ndim != 1 or len(values) != len(users) or values.dtype.kind not in "iu":
            raise ValueError("arrays of another shape or type than ranks have")
    above, tied, candidates = (values.astype(np.int64) for values in arrays)
    if not ((above >= 0) & (tied >= 0) & (above + tied <= candidates)).all():
        raise ValueError("a rank beyond the candidates")
    return users, Ranks(*arrays)
