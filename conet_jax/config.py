"""Config fields with their defaults, the variants that every data set shares, and their checks."""

import difflib
import math
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from conet_jax.errors import InputError

# The recommended recipe and what is left of it without the source domain, or without lasso.
OURS = ("", "ours_conet", "ours_mlp_joined", "ours_mlp")
# The paper's models and hyper-parameters, its baselines, and what it says in footnotes.
PAPER = ("conet", "lasso", "mlp", "bprmf", "cmf", "cmf_squared", "fm", "mlp_shared", "cross_stitch")
FOOTNOTES = ("pretrain", "dropout", "l2", "low_rank", "per_direction", "group_lasso")
REFERENCES = ("popularity", "ials", "ials_joined", "ease", "ease_joined")
PUBLISHED = ("published", "published_conet", "published_mlp")
VARIANTS = OURS + PAPER + FOOTNOTES + REFERENCES + PUBLISHED
MODEL_NAMES = (
    "conet",
    "mlp",
    "cross_stitch",
    "bprmf",
    "cmf",
    "fm",
    "ials",
    "ease",
    "popularity",
)
TOWERS = ("conet", "mlp", "cross_stitch")
# Fields that may differ between a workdir and the command that resumes it.
FREE_FIELDS = ("devices", "platform", "epochs", "on_nonfinite", "data.dir", "data.prepare")


def default_config(variant: str = "") -> ConfigDict:
    """Returns every config field with its default under a variant.

    Args:
      variant: "" is our recommended recipe, CoNet with lasso; "ours_conet" is the same without
        lasso, "ours_mlp" without the source domain, "ours_mlp_joined" without it but for the
        start. ``PAPER`` are the paper's models, baselines and hyper-parameters with our decisions
        where it is silent, ``FOOTNOTES`` what it tried beside, ``REFERENCES`` linear models and
        popularity, ``PUBLISHED`` the procedure of the authors' code.

    Returns:
      A flat ``ConfigDict`` (``data`` apart); configs/*.py set what a data set differs in.

    Raises:
      InputError: no such variant.
    """
    if variant not in VARIANTS:
        raise InputError(f"unknown variant {variant!r}: the variants are {', '.join(VARIANTS[1:])}")
    config = ConfigDict()
    config.name = "run"  # data set, set by configs/*.py; names the workdir
    config.variant = variant
    config.data = ConfigDict({"dir": "", "drop": 0})  # dir: folder made by launch/prepare.py; drop:
    # training interactions of the target removed from each user at random, at least one is left

    # Model: Eqs. 1-4.
    config.model = "conet"  # a name in conet_jax/models/__init__.py
    config.layers = (64, 32, 16, 8)  # Sec. 3.1; the first is [user, item], 32 each
    config.cross_layers = 3  # crossed transitions from the lowest, all of them; 0 is no transfer
    config.cross_per_direction = False  # footnote 1: one H^l serves both directions
    config.cross_rank = 0  # footnote 3: H^l = U^T V of this rank; 0 is a full matrix
    config.inner_product = False  # second logit term w^T (p_u * q_i), w learned
    config.inner_weight = 1.0  # start of every entry of w
    config.output_bias = 0.0  # start of the output's bias, with an inner product
    config.output_scale = 1.0  # factor on the towers' output weights at the start, under he
    config.initializer = "he"  # of the towers; gaussian is the paper's N(0, 0.01^2)
    config.warm_start = ""  # ials: tables start from a factorisation of the model's domains;
    # crossfit: they are such factors and stay, fitted without the pair for an example in training
    # (conet_jax/models/crossfit.py); pretrain: users start from an MLP on the source (footnote 10)
    config.pretrain_epochs = 10  # of that MLP
    config.ials_sweeps = 15  # of that factorisation
    config.folds = 5  # crossfit: parts of the training pairs; 0 is factors that have seen the pair
    config.fold_sweeps = 4  # crossfit: sweeps without each fold, from the factors of all pairs

    # Linear models: ials, ease and the warm start.
    config.joined = False  # ials, ease, a warm start: the items of both domains side by side
    # Chosen on validation (NDCG@10, seed 0) on the three real pairs; README, "The search".
    config.ials_regularization = 200.0  # lambda of Hu, Koren and Volinsky 2008
    config.ials_alpha = 50.0  # confidence of a pair above that of the others
    config.ials_source_weight = 0.2  # weight of the source's squared errors where both are joined
    config.ease_regularization = 100.0  # lambda of Steck 2019
    config.max_items = 20_000  # ease refuses more

    # Objective: Eqs. 5, 7, 8.
    config.target_weight = 0.6  # alpha of Eq. 7; Sec. 3.3 finds 0.6 best on Amazon, 0.8 on Mobile
    config.reduction = "sum"  # of a step's examples, as Eq. 5; or mean
    config.loss_scale = 1.0  # factor on the loss of a step
    config.l1 = 0.0  # lambda of Eq. 8, against the mean loss per example in nats
    config.l1_method = "subgradient"  # sign(H) in the gradient; proximal reaches exact zeros;
    # group: group lasso on the rows of the H^l, proximal
    config.l2 = 0.0  # half of it weighs the squared norm of the H^l; in bprmf, cmf and fm of the
    # rows that an example reads
    config.dropout = 0.0  # rate on the merged embedding, in training
    config.cmf_loss = "logistic"  # cmf: or squared, weighted
    config.negative_weight = 1.0  # cmf: weight of a negative's squared error

    # An epoch.
    config.pairing = "same_user"  # what meets what in Eq. 3: random, same_user, profile, or views:
    # the same pair seen by both towers, each with its domain's view of the user
    config.surplus = "repeat"  # random, profile, views: the shorter domain is repeated; or alone
    config.profile_length = 32  # pairing profile: at most so many of a user's items a step
    config.negatives = 1  # sampled negatives a positive, Sec. 3.1
    config.batch_size = 128  # positives a step and domain, Sec. 3.1
    config.inference = "cross"  # with the user's source profile as source input; or target

    # Optimiser: Adam, Sec. 3.1.
    config.learning_rate = 1e-3
    config.clip_norm = 0.0  # each variable's gradient norm at most this; 0 is no clipping

    # Run.
    config.epochs = 30
    config.patience = 5  # epochs without a better validation NDCG before stopping
    config.seed = 0
    config.eval_k = 10  # cut-off of HR, NDCG and MRR
    config.devices = 0  # to train and rank on, over all processes; 0 is all there are. Results do
    # not depend on it but for rounding: the batch is that of all devices together
    config.platform = ""  # cpu, gpu or tpu; empty is JAX's choice
    config.on_nonfinite = "stop"  # a loss, gradient or score that is not finite; rollback: back to
    # the last checkpoint, and on at half the learning rate, five times at most
    config.dtype = "float32"  # of the towers' activations and products: or bfloat16; all else stays

    if variant in ("mlp", "ours_mlp", "ours_mlp_joined", "published_mlp", "pretrain"):
        config.model = "mlp"
        config.cross_layers = 0
        config.inference = "target"
    if variant == "lasso":
        # Of 1e-6, 1e-5, …, 1e-2 the best on validation (NDCG@10, seed 0, mean of movies_books,
        # douban, cell_electronics: .2154 .2160 .2129 .2138 .2146); differences are within noise.
        config.l1 = 1e-5
    if variant in OURS:
        # The towers learn what a linear model misses: tables are cross-fitted factors of iALS,
        # whose score is the second term of the logit (README, "The search").
        config.warm_start = "crossfit"
        config.layers = (128, 64, 32, 16)  # 64 factors; the tower pattern of Sec. 3.1
        config.inner_product = True
        config.inner_weight = 5.0
        config.output_bias = -2.5
        config.output_scale = 0.1
        config.learning_rate = 3e-3
        config.negatives = 4
        config.batch_size = 512
        config.target_weight = 0.8
        config.l1_method = "proximal"
        config.pairing = "views"
    if variant == "":
        config.l1 = 1e-5
    if config.model == "mlp":
        config.target_weight = 1.0
    if variant == "ours_mlp_joined":
        config.joined = True
    if variant == "mlp_shared":
        config.cross_layers = 0
        config.pairing = "random"
        config.inference = "target"
    if variant == "cross_stitch":
        config.model = "cross_stitch"
        config.layers = (64, 64, 64, 64)
    if variant == "pretrain":
        config.warm_start = "pretrain"
    if variant == "dropout":
        config.dropout = 0.3
    if variant == "l2":
        config.l2 = 1e-4
    if variant == "low_rank":
        config.cross_rank = 4
    if variant == "per_direction":
        config.cross_per_direction = True
    if variant == "group_lasso":
        config.l1 = 1e-5
        config.l1_method = "group"
    if variant in ("bprmf", "cmf", "fm"):
        config.model = variant
    if variant == "cmf_squared":
        config.model = "cmf"
        config.cmf_loss = "squared"
    if variant in REFERENCES:
        config.model = variant.removesuffix("_joined")
        config.joined = variant.endswith("_joined")
    if config.model == "ials":
        config.layers = (128, 64)  # 64 factors: as many as the recommended recipe's inner product
    if variant in ("cmf", "cmf_squared", "bprmf", "ials", "ease", "popularity"):
        config.inference = "target"
    if variant.startswith("published"):
        # design.md, "Where the paper is silent, or its published code differs from it".
        config.initializer = "gaussian"
        config.inference = "target"
        config.clip_norm = 10.0
        config.epochs = 50
        config.patience = 50
    if variant in ("published", "published_conet"):
        config.pairing = "random"
        config.surplus = "alone"
        config.cross_layers = 2
        config.target_weight = 0.5  # weights of 1 and 1 ...
        config.loss_scale = 2.0  # ... are 0.5 and 0.5 of twice the loss
    if variant == "published":
        config.l1 = 0.1
    return config


def _one_of(*names: str) -> Any:
    return lambda value: value in names, "one of " + ", ".join(names)


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Any:
    def check(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return (
            is_number
            and math.isfinite(value)
            and (low < value if above else low <= value)
            and (value <= high)
        )

    bracket = "(" if above else "["
    return check, f"a number in {bracket}{low:g}, {high:g}]".replace("inf]", "inf)")


def _integer(low: int, high: int = 2**31 - 1) -> Any:
    def check(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return check, f"a whole number from {low} to {high}"


_BOOL = (lambda value: isinstance(value, bool), "true or false")
_CHECKS: dict[str, Any] = {
    "name": (lambda value: isinstance(value, str) and value != "", "a name for the run's folder"),
    "variant": (lambda value: value in VARIANTS, "one of " + ", ".join(VARIANTS[1:])),
    "model": _one_of(*MODEL_NAMES),
    "cross_layers": _integer(0),
    "cross_per_direction": _BOOL,
    "cross_rank": _integer(0),
    "inner_product": _BOOL,
    "inner_weight": _number(-math.inf),
    "output_bias": _number(-math.inf),
    "output_scale": _number(0),
    "warm_start": _one_of("", "ials", "crossfit", "pretrain"),
    "pretrain_epochs": _integer(1),
    "ials_sweeps": _integer(1),
    "folds": (
        lambda value: _integer(0, 1000)[0](value) and value != 1,
        "0, or a whole number from 2 to 1000",
    ),
    "fold_sweeps": _integer(1),
    "joined": _BOOL,
    "ials_regularization": _number(0, above=True),
    "ials_alpha": _number(0, above=True),
    "ials_source_weight": _number(0, above=True),
    "ease_regularization": _number(0, above=True),
    "max_items": _integer(1),
    "initializer": _one_of("he", "gaussian"),
    "target_weight": _number(0, 1),
    "reduction": _one_of("sum", "mean"),
    "loss_scale": _number(0, above=True),
    "l1": _number(0),
    "l1_method": _one_of("subgradient", "proximal", "group"),
    "l2": _number(0),
    "cmf_loss": _one_of("logistic", "squared"),
    "negative_weight": _number(0, above=True),
    "dropout": _number(0, 0.99),
    "pairing": _one_of("random", "same_user", "profile", "views"),
    "surplus": _one_of("repeat", "alone"),
    "profile_length": _integer(1),
    "negatives": _integer(1),
    "batch_size": _integer(1),
    "inference": _one_of("target", "cross"),
    "learning_rate": _number(0, above=True),
    "clip_norm": _number(0),
    "epochs": _integer(1),
    "patience": _integer(1),
    "seed": _integer(0),
    "eval_k": _integer(1),
    "devices": _integer(0),
    "platform": _one_of("", "cpu", "gpu", "cuda", "rocm", "tpu"),
    "on_nonfinite": _one_of("stop", "rollback"),
    "dtype": _one_of("float32", "bfloat16"),
}


def validate(config: ConfigDict) -> None:
    """Checks every field's type and range, and that the fields fit each other.

    Raises:
      InputError: names the field, its value and what is expected; for an unknown field, the
        nearest known one.
    """
    known = set(default_config())
    for field in config:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f"; did you mean config.{near[0]}?" if near else ""
            raise InputError(
                f"unknown config field config.{field}{hint or '; conet_jax/config.py lists them'}"
            )
    data = config.get("data")
    if not isinstance(data, ConfigDict) or set(data) - {"dir", "prepare", "synthetic", "drop"}:
        fields = sorted(data) if isinstance(data, ConfigDict) else data
        raise InputError(
            f"config.data is {fields!r}: expected fields dir, prepare, synthetic or drop"
        )
    check, expected = _integer(0)
    if not check(data.get("drop", 0)):
        raise InputError(f"config.data.drop is {data.drop!r}: expected {expected}")
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
            f"config.data.dir is {data.dir!r}, but this config makes its data: take the config of "
            "a data set, configs/movies_books.py for one"
        )
    for field, (check, expected) in _CHECKS.items():
        if field not in config:
            raise InputError(f"config.{field} is missing: expected {expected}")
        if not check(config[field]):
            raise InputError(f"config.{field} is {config[field]!r}: expected {expected}")
    if not isinstance(config.layers, list | tuple):
        raise InputError(f"config.layers is {config.layers!r}: expected widths, as (64, 32, 16, 8)")
    layers = tuple(config.layers)
    widths_fit = len(layers) >= 2 and all(_integer(1)[0](width) for width in layers)
    if not widths_fit or layers[0] % 2:
        raise InputError(
            f"config.layers is {layers!r}: expected at least two positive widths, the first even: "
            "it is the merged embedding, half user and half item"
        )
    crosses = config.model in ("conet", "cross_stitch")
    if crosses and config.cross_layers > len(layers) - 1:
        raise InputError(
            f"config.cross_layers is {config.cross_layers}: layers {layers} have only "
            f"{len(layers) - 1} transitions to cross"
        )
    if config.model == "cross_stitch" and len(set(layers)) > 1:
        raise InputError(
            f"config.layers is {layers!r}: a cross-stitch network mixes activations of one space, "
            "so expected equal widths, such as (64, 64, 64, 64)"
        )
    if config.dtype != "float32" and config.model not in TOWERS:
        raise InputError(
            f"config.dtype is {config.dtype!r}: expected float32 with config.model={config.model}, "
            "which has no towers"
        )
    if config.warm_start and config.model not in TOWERS:
        raise InputError(
            f"config.warm_start is {config.warm_start!r}: expected '' with "
            f"config.model={config.model}; it is for conet, mlp and cross_stitch"
        )
    crossfit = config.warm_start == "crossfit"
    if crossfit and config.model == "cross_stitch":
        raise InputError(
            "config.warm_start is 'crossfit' with config.model=cross_stitch: expected conet or mlp"
        )
    if config.model in ("conet", "cross_stitch") and crossfit != (config.pairing == "views"):
        raise InputError(
            f"config.pairing is {config.pairing!r} with config.warm_start={config.warm_start!r}: "
            "pairing=views and warm_start=crossfit go together, since a view is a row of those "
            "factors"
        )
    if config.model == "conet" and config.pairing == "views" and config.inference != "cross":
        raise InputError(
            "config.inference is 'target' with config.pairing=views, where the target tower is "
            "trained with the source's: expected cross, or config.cross_layers=0 beside it"
        )
    if config.model == "mlp" and (config.cross_layers or config.inference == "cross"):
        raise InputError(
            "config.model is 'mlp', which has one tower: set config.cross_layers=0 and "
            "config.inference=target, or take the variant :mlp"
        )
    if config.pairing == "same_user" and config.surplus == "alone":
        raise InputError(
            "config.surplus is 'alone', but with config.pairing=same_user no domain has a "
            "surplus: expected repeat"
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
    """Returns a stored config with the fields that came after it, which were at their defaults."""
    return {"dtype": "float32", "on_nonfinite": "stop"} | stored


def differences(
    stored: dict[str, Any], config: ConfigDict, *, free: Collection[str] = FREE_FIELDS
) -> list[str]:
    """Fields in which a config differs from a workdir's, but for those that are free to.

    Args:
      stored: contents of the workdir's config.json.
      config: config of this command.
      free: fields that may differ.

    Returns:
      ["config.field is … there and … here", …], empty if they agree.

    Example:
      >>> here = ConfigDict({"dtype": "float32", "l1": 0.2, "epochs": 5})
      >>> differences({"l1": 0.1, "epochs": 3}, here)
      ['config.l1 is 0.1 there and 0.2 here']
    """
    there, here = flatten(completed(stored)), flatten(config.to_dict())
    return [
        f"config.{field} is {there.get(field)!r} there and {here.get(field)!r} here"
        for field in sorted(there.keys() | here.keys())
        if field not in free and there.get(field) != here.get(field)
    ]
