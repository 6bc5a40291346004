"""A budget of time for a study, kept over the calls that it takes."""

import time
from pathlib import Path
from typing import Any

from conet_jax import files
from conet_jax.errors import InputError
from conet_jax.files import write_json

_MARGIN = 1.3  # on a cost that is foretold


class Clock:
    """Seconds that all calls on a workdir have taken; those of work cut short are lost.

    Args:
      path: of the file that keeps them.
      budget: seconds of all calls together.
    """

    def __init__(self, path: Path, budget: float) -> None:
        self.path, self.budget, self._before = path, budget, 0.0
        if path.exists():
            self._before = float(stored(path, "seconds", (int, float)))
        self._since = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return self._before + time.monotonic() - self._since

    def keep(self) -> None:
        """Writes the seconds so far."""
        write_json(self.path, {"seconds": round(self.spent, 3)})

    def fits(self, cost: float, share: float) -> bool:
        """Whether work of a foretold cost ends within a share of the budget."""
        return self.spent + _MARGIN * cost <= share * self.budget

    def say(self, text: str) -> None:
        """Prints a line with the time left."""
        left = self.budget - self.spent
        rest = f"{in_words(left)} left" if left > 0 else "beyond the budget"
        print(f"[{in_words(self.spent)} spent, {rest}] {text}", flush=True)


def in_words(seconds: float) -> str:
    """Returns a time as a person reads it.

    >>> in_words(42), in_words(600), in_words(4000)
    ('42 s', '10 min', '1 h 07 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def stored(path: Path, field: str, kinds: tuple[type, ...]) -> Any:
    """Returns a field of what a study has written down.

    Args:
      path: a JSON file.
      field: its name.
      kinds: types that it may have.

    Raises:
      InputError: the file cannot be read, or the field is of another type.
    """
    try:
        value = files.read_json(path)[field]
        if type(value) not in kinds:
            raise TypeError(f"{field} is of another type")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read as what a study has decided ({error!r}); take it away, and the "
            "study decides anew"
        ) from None
    return value
