"""Points of a study: config fields by dotted name, from a grid, a space or a config file."""

import difflib
import itertools
import math
import re
import shlex
from collections.abc import Callable, Container, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import tuple_parser

from conet_jax import config as config_lib
from conet_jax.console import typed
from conet_jax.errors import InputError
from conet_jax.studies import search

Point = dict[str, Any]  # what it changes of a config; empty is the config as it is

# The parsers of launch/train.py: a value means the same here and there.
_PARSERS = {
    float: flags.FloatParser(),
    bool: flags.BooleanParser(),
    tuple: tuple_parser.TupleParser(),
    int: flags.IntegerParser(),
    str: flags.ArgumentParser(),
}
_DRAWN = re.compile(r"(log|uniform)\(([^,]+),([^,]+)\)")


def parse_grid(texts: Sequence[str], config: ConfigDict) -> list[Point]:
    """Returns the points of a grid.

    Args:
      texts: ``config.FIELD=VALUE,VALUE…`` each; a tuple is written in brackets.
      config: whose fields they are.

    Raises:
      InputError: there is no such field, or a value is of another type.

    Example:
      >>> parse_grid(["config.l1=0,1e-6", "config.negatives=4"], config_lib.default_config())
      [{'l1': 0.0, 'negatives': 4}, {'l1': 1e-06, 'negatives': 4}]
    """
    fields: dict[str, str] = {}
    for text in texts:
        name, values = _field(text, config)
        fields[_once(name, fields)] = values
    values = [
        [_value(text, name, config) for text in _split(texts)] for name, texts in fields.items()
    ]
    for name, several in zip(fields, values, strict=True):
        twice = [value for at, value in enumerate(several) if value in several[:at]]
        if twice:
            raise InputError(f"config.{name} has the value {twice[0]!r} twice: expected each once")
    return [dict(zip(fields, point, strict=True)) for point in itertools.product(*values)]


def parse_space(texts: Sequence[str], config: ConfigDict) -> search.Space:
    """Returns the space of a random search.

    Args:
      texts: ``config.FIELD=log(LOW,HIGH)``, ``=uniform(LOW,HIGH)`` or ``=VALUE,VALUE…`` each; or
        ``default`` alone, the space that launch/table2.py has for the config's variant.
      config: whose fields they are.

    Raises:
      InputError: there is no such field or space, or a value is of another type.

    Example:
      >>> parse_space(["config.l1=log(1e-6,1e-4)"], config_lib.default_config())
      {'l1': Range(low=1e-06, high=0.0001, log=True)}
    """
    if list(texts) == ["default"]:
        space = search.SPACES.get(config.variant)
        if not space:
            raise InputError(
                f"--space=default: the variant {config.variant!r} has no space of its own; write "
                "--space='config.FIELD=log(LOW,HIGH)'"
            )
        return space
    space: search.Space = {}
    for text in texts:
        name, values = _field(text, config)
        _once(name, space)
        drawn = _DRAWN.fullmatch(values)
        if drawn is None:
            space[name] = tuple(_value(text, name, config) for text in _split(values))
            continue
        kind, *bounds = drawn.groups()
        low, high = (_value(bound, name, config) for bound in bounds)
        fits = isinstance(low, float) and -math.inf < low < high < math.inf
        if not fits or (kind == "log" and low <= 0):
            raise InputError(
                f"--space={text}: expected a real-valued field and LOW < HIGH, with log 0 < LOW; "
                "choices are written VALUE,VALUE"
            )
        space[name] = search.Range(low, high, log=kind == "log")
    return space


def _field(text: str, config: ConfigDict) -> tuple[str, str]:
    name, equals, values = text.partition("=")
    name = name.strip().removeprefix("config.")
    if not (equals and name):
        raise InputError(f"{text!r} is no field with values: expected config.FIELD=VALUE,VALUE")
    check_field(name, config)
    return name, values


def _once(name: str, given: Container[str]) -> str:
    if name in given:
        raise InputError(f"config.{name} is given twice: write its values after one =, by commas")
    return name


def check_field(name: str, config: ConfigDict) -> None:
    """Raises ``InputError`` where a config has no field of that dotted name to sweep."""
    known = config_lib.flatten(config.to_dict())
    if name in ("seed", "variant", "name", "eval_k"):
        other = {
            "seed": "--seeds is for it",
            "name": "it names folders alone",
            "eval_k": "metrics of different cuts do not compare",
        }
        raise InputError(
            f"config.{name} cannot be swept: "
            + other.get(name, "take launch/table2.py --methods, or a sweep a variant")
        )
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean config.{near[0]}?" if near else ""
        raise InputError(
            f"unknown config field config.{name}{hint or '; conet_jax/config.py lists them'}"
        )


def _split(text: str) -> list[str]:
    """Splits at the commas outside brackets.

    >>> _split("(64, 32),(32,16)")
    ['(64, 32)', '(32,16)']
    """
    return [part.strip() for part in re.split(r",(?![^(\[]*[)\]])", text)]


def _value(text: str, name: str, config: ConfigDict) -> Any:
    old = config_lib.flatten(config.to_dict())[name]
    kind = tuple if isinstance(old, list) else type(old)
    try:
        return _PARSERS[kind].parse(text.strip())
    except (KeyError, TypeError, ValueError, SyntaxError):
        raise InputError(f"config.{name} is {text!r}: expected a value as {old!r} is one") from None


def stored_points(stored: Callable[..., None], config: ConfigDict) -> list[Point]:
    """Returns the points of a config file's ``sweep(add)``: ``add(field=value, …)`` adds one.

    Raises:
      InputError: there is no such field, or no point was added.
    """
    points: list[Point] = []

    def add(**fields: Any) -> None:
        point = {name.removeprefix("config."): value for name, value in fields.items()}
        for name in point:
            check_field(name, config)
        points.append(point)

    stored(add)
    if not points:
        raise InputError("sweep(add) of the config file has added no point: call add(field=value)")
    return points


def described(overrides: Point) -> str:
    """Returns fields as a person reads them.

    >>> described({"l1": 0.0, "negatives": 4}), described({})
    ('l1=0.0, negatives=4', 'defaults')
    """
    return ", ".join(f"{name}={value}" for name, value in overrides.items()) or "defaults"


def command(name: str, file: str, fields: dict[str, Any], *flags: str) -> str:
    """Returns the command line of a launcher under a config file and fields by dotted name.

    >>> command("train", "configs/demo.py:lasso", {"l1": 1e-05}, "--workdir=a run")
    "python launch/train.py --config=configs/demo.py:lasso --config.l1=1e-05 '--workdir=a run'"
    """
    fields = [f"--config.{field}={value}" for field, value in fields.items()]
    return shlex.join(
        [*typed(f"python launch/{name}.py").split(), f"--config={file}", *fields, *flags]
    )
