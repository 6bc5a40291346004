"""NCF-style data: training pairs, a test item for each user, and its negatives, a file each."""

import os
import re
from typing import NamedTuple, NoReturn

import polars as pl

from conet_jax.data import formats, lines
from conet_jax.errors import InputError

_PAIR = re.compile(r"\(([^,]+),\s*(.+)\)")
_FILES = (
    ("train.txt", "test.txt", "test_neg.txt"),
    (".train.rating", ".test.rating", ".test.negative"),
)


class Given(NamedTuple):
    """Test items and their negatives as an NCF-style data set lists them, row = test user."""

    users: list[str]
    items: list[str]
    negatives: list[list[str]]


def is_prefix(name: str) -> bool:
    """Whether ``name`` begins the names of the three files."""
    return os.path.isfile(name + _FILES[1][0])


def paths(name: str) -> list[str]:
    """Returns the files for training, test and negatives, of a folder or prefix.

    Raises:
      InputError: one is missing.
    """
    if os.path.isdir(name):
        found = [os.path.join(name, file) for file in _FILES[0]]
    else:
        found = [name + suffix for suffix in _FILES[1]]
    for file in found:
        if not os.path.isfile(file):
            raise InputError(
                f"{file}: no such file; NCF-style data is a folder with train.txt, test.txt and "
                "test_neg.txt, or the prefix X of X.train.rating, X.test.rating, X.test.negative"
            )
    return found


def given(test: str, pairs: pl.DataFrame, negative: str) -> Given:
    """Returns the test items with their negatives.

    Args:
      test: name of the file with test items.
      pairs: its users and items.
      negative: the file with a line for each of them.

    Raises:
      InputError: a user stands twice in a file, or is missing from one.
    """
    users, items = pairs["user"].to_list(), pairs["item"].to_list()
    repeated = pairs.filter(pl.col("user").is_duplicated())
    if len(repeated):
        raise InputError(
            f"{test}: user {repeated['user'][0]!r} has more than one test item: expected one"
        )
    lists = _negatives(negative, dict(zip(users, items, strict=True)))
    lacking = next((user for user in users if user not in lists), None)
    if lacking is not None:
        raise InputError(f"{negative}: no line for user {lacking!r} of {test}: expected one")
    return Given(users, items, [lists[user] for user in users])


def _negatives(name: str, tests: dict[str, str]) -> dict[str, list[str]]:
    lists: dict[str, list[str]] = {}
    with formats.readable(name), formats.opened(name) as file:
        for number, line in lines.strictly(name, file):
            if not line:
                continue
            pair, *items = line.removesuffix("\t").split("\t")
            found = _PAIR.fullmatch(pair)
            if found is None or not items or not all(items):
                _bad(name, number, f"expected '(user, item)' and items; {line[:60]!r}")
            user, item = found.groups()
            if tests.get(user) != item:
                _bad(name, number, f"{pair} is not in the test file: expected its pairs")
            if user in lists:
                _bad(name, number, f"a second line for user {user!r}: expected one")
            lists[user] = items
    if not lists:
        raise InputError(f"{name}: the file is empty: expected the negatives of a test item a line")
    return lists


def _bad(name: str, number: int, what: str) -> NoReturn:
    raise InputError(f"{name}:{number}: {what}")
