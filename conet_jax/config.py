"""The config: every field with its default and what may stand in it.

A config is flat (``data`` apart). ``configs/NAME.py`` says in what a data set differs, ``variants``
what a variant changes. What fits only some model is checked where that model is (its ``check``).
"""

import difflib
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from conet_jax.errors import InputError
from conet_jax.variants import OLD_NAMES, PLAIN, VARIANTS


class Field(NamedTuple):
    """A field: its default, whether a value may stand in it, and in words what may."""

    default: Any
    fits: Callable[[Any], bool]
    expected: str


def _one_of(default: str, *others: str) -> Field:
    names = (default, *others)
    return Field(default, lambda value: value in names, "one of " + ", ".join(names))


def _number(default: float, low: float, high: float = math.inf, *, above: bool = False) -> Field:
    def fits(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return (
            is_number
            and math.isfinite(value)
            and (low < value if above else low <= value)
            and (value <= high)
        )

    bracket = "(" if above else "["
    return Field(default, fits, f"a number in {bracket}{low:g}, {high:g}]".replace("inf]", "inf)"))


def _integer(default: int, low: int, high: int = 2**31 - 1) -> Field:
    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return Field(default, fits, f"a whole number from {low} to {high}")


def _boolean(default: bool) -> Field:
    return Field(default, lambda value: isinstance(value, bool), "true or false")


def _text(default: str) -> Field:
    return Field(default, lambda value: isinstance(value, str), "text")


def _are_cuts(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not all(map(_integer(1, 1).fits, value)):
        return False
    return 0 < len(value) == len(set(value))


def _widths(default: tuple[int, ...]) -> Field:
    one = _integer(1, 1).fits

    def fits(value: Any) -> bool:
        if not isinstance(value, list | tuple):
            return False
        if not value:
            return not default  # none only where that is the default
        return len(value) >= 2 and all(map(one, value)) and value[0] % 2 == 0

    return Field(
        default,
        fits,
        "at least two positive widths, as (64, 32, 16, 8), the first even: it is the merged "
        "embedding, half user and half item",
    )


FIELDS: dict[str, Field] = {
    "name": _text("run"),  # data set, set by configs/*.py; names the workdir
    "variant": Field(PLAIN, lambda value: value in VARIANTS, "one of " + ", ".join(VARIANTS)),
    # Model: Eqs. 1-4.
    "model": _text("conet"),  # a name in conet_jax/models/__init__.py
    "layers": _widths((64, 32, 16, 8)),  # Sec. 3.1; the first is [user, item], 32 each
    "source_layers": _widths(()),  # of the source tower, where they differ (footnote 1)
    "cross_layers": _integer(3, 0),  # crossed transitions from the lowest, all; 0 is no transfer
    "cross_per_direction": _boolean(False),  # footnote 1: one H^l serves both directions
    "cross_skip": _integer(0, 0),  # layers that a connection may skip (footnote 1)
    "cross_rank": _integer(0, 0),  # footnote 3: H^l = U^T V of this rank; 0 is a full matrix
    "initializer": _one_of("he", "gaussian"),  # of the towers; the paper's is N(0, 0.01^2)
    "inference": _one_of("cross", "target"),  # with the user's source history as source input, or
    # the target tower alone
    "dtype": _one_of("float32", "bfloat16"),  # of the towers' activations and products
    "pretrain_epochs": _integer(
        0, 0
    ),  # of an MLP on the source whose users are the start (note 10)
    # Linear models, and the factors of the recipe.
    "joined": _boolean(False),  # the items of both domains side by side
    # Chosen on validation (NDCG@10, seed 0) on three real pairs; docs/recipe.md, "The search".
    "ials_regularization": _number(200.0, 0, above=True),  # lambda of Hu, Koren, Volinsky 2008
    "ials_alpha": _number(50.0, 0, above=True),  # confidence of a pair above that of the others
    "ials_source_weight": _number(0.2, 0, above=True),  # of the source's squared errors, if joined
    "ials_trials": _integer(32, 0, 10_000),  # points of the search for these three (and then for
    # neighbour_weight), run/tune.py; 0 takes them as they are
    "ease_regularization": _number(100.0, 0, above=True),  # lambda of Steck 2019
    "map_hidden": _integer(0, 0),  # emcdr: hidden units of the map to the target; 0 is linear
    "map_ridge": _number(0.01, 0, above=True),  # emcdr: of the map's weights, factors of size 1
    "ease_source_weight": _number(0.2, 0, above=True),  # ease_bridged: of the source's items
    "max_items": _integer(20_000, 1),  # ease refuses more
    "ials_sweeps": _integer(15, 1),  # recipe: of the factorisation of all training pairs
    "folds": Field(  # recipe: parts of the training pairs; 0 is factors that have seen the pair
        5,
        lambda value: _integer(0, 0, 1000).fits(value) and value != 1,
        "0, or a whole number from 2 to 1000",
    ),
    "fold_sweeps": _integer(4, 1),  # recipe: sweeps without each fold, from the factors of all
    "neighbours": _integer(32, 0, 1000),  # recipe: of an item in each domain; 0 is none
    "neighbour_weight": _number(2.0, 0),  # recipe: start of v, for the item's own domain
    "inner_weight": _number(5.0, -math.inf),  # recipe: start of every w in w^T (p_u * q_i)
    "output_bias": _number(-2.5, -math.inf),  # recipe: start of the towers' output bias
    "output_scale": _number(0.1, 0),  # recipe: factor on the towers' output weights at the start
    # Objective: Eqs. 5, 7, 8. A step's examples are summed, as in Eq. 5.
    "target_weight": _number(0.6, 0, 1),  # alpha of Eq. 7; Sec. 3.3: 0.6 best on Amazon, 0.8 Mobile
    "loss_scale": _number(1.0, 0, above=True),  # factor on the loss of a step
    "l1": _number(0.0, 0),  # lambda of Eq. 8, against the mean loss per example in nats
    "l1_method": _one_of("subgradient", "proximal", "group"),  # sign(H) in the gradient; a proximal
    # step, which reaches exact zeros; group lasso on the rows of the H^l, proximal
    "l2": _number(0.0, 0),  # half of it weighs the squared norm of the H^l; in bprmf, cmf, fm and
    # lightgcn of the rows that an example reads
    "dropout": _number(0.0, 0, 0.99),  # rate on the merged embedding, in training
    "cmf_loss": _one_of("logistic", "squared"),
    "negative_weight": _number(1.0, 0, above=True),  # cmf: weight of a negative's squared error
    # An epoch.
    "pairing": _one_of("same_user", "random"),  # which source example meets a target example
    "surplus": _one_of("repeat", "alone"),  # random: the shorter domain is repeated, or the rest of
    # the longer one is trained alone
    "graph_layers": _integer(3, 0),  # lightgcn: layers of its propagation
    "history_length": _integer(32, 1),  # fm: at most so many of a user's source items a step
    "negatives": _integer(1, 1),  # sampled negatives per positive, Sec. 3.1
    "negatives_avoid_seen": _boolean(False),  # none is a target item that its user has rated below
    # the threshold
    "batch_size": _integer(128, 1),  # positives per step and domain, Sec. 3.1
    # Optimiser: Adam, Sec. 3.1.
    "learning_rate": _number(1e-3, 0, above=True),
    "clip_norm": _number(0.0, 0),  # each variable's gradient norm at most this; 0 is no clipping
    # Run.
    "epochs": _integer(30, 1),
    "patience": _integer(5, 1),  # epochs without a better validation NDCG before stopping
    "seed": _integer(0, 0),
    "eval_k": Field(  # cut-offs of HR, NDCG and MRR; the first chooses epochs, trials and points
        (10, 5, 20),
        _are_cuts,
        "whole numbers from 1 up, each once, as (10, 5, 20): the first chooses epochs",
    ),
    "devices": _integer(0, 0),  # to train and rank on, over all processes; 0 is all there are.
    # Results do not depend on it but for rounding: the batch is that of all devices together
    "platform": _one_of("", "cpu", "gpu", "cuda", "rocm", "tpu"),  # empty is JAX's choice
    "on_nonfinite": _one_of("stop", "rollback"),  # of a loss, gradient or score: or back to the
    # last checkpoint, and on at half the learning rate, five times at most
}
# Fields that came later, with what they were before; of those of other models, and of a start that
# has happened, a stored config without them reads none.
_LATER = {"ials_trials": 0, "neighbours": 0, "negatives_avoid_seen": False}
_UNREAD = "graph_layers", "map_hidden", "map_ridge", "ease_source_weight", "neighbour_weight"
_LATER |= {name: FIELDS[name].default for name in _UNREAD}
# Fields that may differ between a workdir and the command that resumes it; of ``eval_k`` all but
# the first, see ``differences``.
FREE_FIELDS = (
    *("devices", "platform", "epochs", "patience", "eval_k", "on_nonfinite"),
    *("data.dir", "data.prepare"),
)


def default_config(variant: str = "") -> ConfigDict:
    """Returns every config field with its value under a variant.

    Args:
      variant: a key of ``variants.VARIANTS``; "" is the plain config, CoNet-lasso as the paper has
        it.

    Returns:
      A flat ``ConfigDict`` (``data`` apart); configs/*.py set what a data set differs in.

    Raises:
      InputError: no such variant.

    Example:
      >>> default_config().variant, default_config("recipe").negatives
      ('lasso', 4)
    """
    variant = variant or PLAIN
    if variant not in VARIANTS:
        now = f": it is called {OLD_NAMES[variant]} now" if variant in OLD_NAMES else ""
        known = ", ".join(VARIANTS)
        raise InputError(f"unknown variant {variant!r}{now or f': the variants are {known}'}")
    config = ConfigDict({name: field.default for name, field in FIELDS.items()})
    config.update(VARIANTS[variant].changes)
    config.variant = variant
    # dir: folder made by launch/prepare.py; drop: training interactions of the target removed from
    # each user at random, at least one is left; cold: users to test on, and as many to validate on,
    # from whom all are taken, drawn by cold_seed.
    config.data = ConfigDict({"dir": "", "drop": 0, "cold": 0, "cold_seed": 0})
    return config


def validate(config: ConfigDict) -> None:
    """Checks every field's type and range, and that the fields fit each other.

    Raises:
      InputError: names the field, its value and what is expected; for an unknown field, the
        nearest known one.
    """
    known = (*FIELDS, "data")
    for name in config:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean config.{near[0]}?" if near else ""
            raise InputError(
                f"unknown config field config.{name}{hint or '; conet_jax/config.py lists them'}"
            )
    _validate_data(config.get("data"))
    for name, field in FIELDS.items():
        if name not in config:
            raise InputError(f"config.{name} is missing: expected {field.expected}")
        if not field.fits(config[name]):
            raise InputError(f"config.{name} is {config[name]!r}: expected {field.expected}")
    if config.pairing == "same_user" and config.surplus == "alone":
        raise InputError(
            "config.surplus is 'alone', but with config.pairing=same_user no domain has a "
            "surplus: expected repeat"
        )
    from conet_jax import models  # with JAX, which --help does without

    models.check(config)
    if config.ials_trials:
        for name in models.tuned_fields(config):
            if config[name] != FIELDS[name].default:
                raise InputError(
                    f"config.{name} is {config[name]!r}, but config.ials_trials="
                    f"{config.ials_trials} searches for it: give config.ials_trials=0 to take the "
                    "constants as they are"
                )


def _validate_data(data: Any) -> None:
    known = {"dir", "prepare", "synthetic", "drop", "cold", "cold_seed"}
    if not isinstance(data, ConfigDict) or set(data) - known:
        fields = sorted(data) if isinstance(data, ConfigDict) else data
        raise InputError(
            f"config.data is {fields!r}: expected fields dir, prepare, synthetic, drop, cold or "
            "cold_seed"
        )
    count = _integer(0, 0)
    for field in ("drop", "cold", "cold_seed"):
        if not count.fits(data.get(field, 0)):
            raise InputError(f"config.data.{field} is {data[field]!r}: expected {count.expected}")
    for field in ("dir", "prepare"):
        if not isinstance(data.get(field, ""), str):
            raise InputError(f"config.data.{field} is {data[field]!r}: expected text")
    if not isinstance(data.get("synthetic", data), ConfigDict):
        raise InputError(
            f"config.data.synthetic is {data.synthetic!r}: expected the fields of "
            "conet_jax.data.synthetic.dataset"
        )
    if "synthetic" in data and data.get("dir"):
        raise InputError(
            f"config.data.dir is {data.dir!r}, but this config makes its data: take "
            "--config=configs/default.py, or the config of a data set"
        )


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested fields under dotted names.

    >>> flatten({"a": 1, "data": {"dir": "x"}})
    {'a': 1, 'data.dir': 'x'}
    """
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def completed(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns a stored config with the fields that came after it, at what they were before.

    Raises:
      ValueError: the config is of a version whose models had other parameters.
    """
    if "warm_start" in stored:
        raise ValueError(
            "it is of version 0.1, whose models have other parameters: train it again, or read it "
            "with that version"
        )
    stored = _LATER | stored
    if isinstance(stored.get("data"), dict):
        stored = stored | {"data": {"cold": 0, "cold_seed": 0} | stored["data"]}
    if isinstance(stored.get("eval_k"), int):  # one cut-off, once
        return stored | {"eval_k": (stored["eval_k"],)}
    return stored


def differences(
    stored: dict[str, Any], config: ConfigDict, *, free: Collection[str] = FREE_FIELDS
) -> list[str]:
    """Fields in which a config differs from a workdir's, but for those that are free to.

    Args:
      stored: contents of the workdir's config.json.
      config: config of this command.
      free: fields that may differ; ``eval_k`` always may, but for its first K.

    Returns:
      ["config.field is … there and … here", …], empty if they agree.

    Example:
      >>> here = ConfigDict({"l1": 0.2, "epochs": 5, "ials_trials": 0})
      >>> differences({"l1": 0.1, "epochs": 3}, here)
      ['config.l1 is 0.1 there and 0.2 here']
    """
    there, here = flatten(completed(stored)), flatten(completed(config.to_dict()))
    found = [
        f"config.{field} is {there.get(field)!r} there and {here.get(field)!r} here"
        for field in sorted(there.keys() | here.keys())
        if field not in (*free, "eval_k") and there.get(field) != here.get(field)
    ]
    cuts = [fields.get("eval_k") for fields in (there, here)]
    first, now = (k[0] if isinstance(k, list) and k else k for k in cuts)
    if first != now:
        found.append(
            f"config.eval_k begins with {first!r} there and with {now!r} here: its first K has "
            "chosen the epochs, and only the others may change"
        )
    return found
