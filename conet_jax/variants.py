"""The variants, as data: what each is, and what it changes of the plain config.

``--config=configs/NAME.py:VARIANT``. The plain config is ``lasso``: CoNet-lasso as the paper has
it, with our decisions where the paper is silent (docs/paper.md).
"""

from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One variant.

    Attributes:
      says: what it is, for the first line that a run prints.
      changes: config fields with their values; all others are at ``config.FIELDS``.
    """

    says: str
    changes: dict[str, Any]


# Of 1e-6, 1e-5, …, 1e-2 the best on validation (NDCG@10, seed 0, mean of movies_books, douban,
# cell_electronics: .2154 .2160 .2129 .2138 .2146); differences are within noise.
_LASSO = {"l1": 1e-5}
_ONE_TOWER = {"model": "mlp", "cross_layers": 0, "inference": "target", "target_weight": 1.0}
# The towers learn what a linear model misses: the tables are out-of-fold factors of implicit ALS,
# whose score is the second term of the logit (docs/recipe.md has the search).
_RECIPE = {
    "model": "recipe",
    "layers": (128, 64, 32, 16),  # 64 factors; the tower pattern of Sec. 3.1
    "learning_rate": 3e-3,
    "negatives": 4,
    "batch_size": 512,
    "target_weight": 0.8,
    "l1_method": "proximal",
}
_RECIPE_ONE_TOWER = _RECIPE | _ONE_TOWER | {"model": "recipe_mlp"}
# The procedure of the authors' code (docs/paper.md).
_PUBLISHED = {
    "initializer": "gaussian",
    "inference": "target",
    "clip_norm": 10.0,
    "epochs": 50,
    "patience": 50,
}
_PUBLISHED_CONET = _PUBLISHED | {
    "pairing": "random",
    "surplus": "alone",
    "cross_layers": 2,
    "target_weight": 0.5,  # weights of 1 and 1 ...
    "loss_scale": 2.0,  # ... are 0.5 and 0.5 of twice the loss
}
_TARGET_ALONE = {"inference": "target"}
_LINEAR = {"layers": (128, 64)}  # 64 factors, as many as the recipe's

# A step propagates all embeddings, there and back: few large steps, and epochs of few steps. Of an
# l2 of 1e-4 (its paper's), .01, .03, .1 and .3 NDCG@10 on warm validation of movies_books was
# .1686, .1776, .1915, .1894 and .1366 (seed 0).
_LIGHTGCN = {
    "model": "lightgcn",
    "batch_size": 2048,
    "learning_rate": 3e-3,
    "l2": 0.03,
    "epochs": 200,
    "patience": 10,
}

PLAIN = "lasso"
RECIPE = {
    "recipe": Variant(
        "the recommended recipe: towers on out-of-fold factors of both domains, crossed, lasso",
        _RECIPE | _LASSO,
    ),
    "recipe_conet": Variant("the recipe without lasso", _RECIPE),
    "recipe_joint_mlp": Variant(
        "the recipe with one tower: the user's vector is of both domains, nothing is crossed",
        _RECIPE_ONE_TOWER | {"joined": True},
    ),
    "recipe_mlp": Variant("the recipe without the source domain: one tower", _RECIPE_ONE_TOWER),
}
PAPER = {
    "lasso": Variant("CoNet-lasso as the paper has it", _LASSO),
    "conet": Variant("CoNet as the paper has it", {}),
    "mlp": Variant("the paper's MLP, on the target domain alone", _ONE_TOWER),
    "bprmf": Variant(
        "BPR matrix factorisation, on the target domain alone", _TARGET_ALONE | {"model": "bprmf"}
    ),
    "cmf": Variant(
        "collective matrix factorisation of both domains", _TARGET_ALONE | {"model": "cmf"}
    ),
    "cmf_squared": Variant(
        "collective matrix factorisation of both domains, squared loss",
        _TARGET_ALONE | {"model": "cmf", "cmf_loss": "squared"},
    ),
    "fm": Variant("factorisation machine with the source's items as context", {"model": "fm"}),
    "mlp_shared": Variant(
        "two MLPs that share their users' embeddings, nothing is crossed",
        {"cross_layers": 0, "pairing": "random", "inference": "target"},
    ),
    "cross_stitch": Variant(
        "cross-stitch network of two towers", {"model": "cross_stitch", "layers": (64, 64, 64, 64)}
    ),
}
FOOTNOTES = {
    "pretrain": Variant(
        "the paper's MLP, its users first trained on the source (footnote 10)",
        _ONE_TOWER | {"pretrain_epochs": 10},
    ),
    "dropout": Variant("CoNet with dropout (footnote 11)", {"dropout": 0.3}),
    "l2": Variant("CoNet with an l2 penalty on the H (footnote 11)", {"l2": 1e-4}),
    "low_rank": Variant("CoNet with H of rank 4 (footnote 3)", {"cross_rank": 4}),
    "per_direction": Variant(
        "CoNet with an H for each direction (footnote 1)", {"cross_per_direction": True}
    ),
    "skip": Variant(
        "CoNet whose cross connections may skip a layer (footnote 1)", {"cross_skip": 1}
    ),
    "unequal": Variant(
        "CoNet with a wider source tower (footnote 1)", {"source_layers": (64, 64, 32, 16)}
    ),
    "group_lasso": Variant(
        "CoNet with a group lasso on the rows of H", _LASSO | {"l1_method": "group"}
    ),
}
REFERENCES = {
    "popularity": Variant("popularity", _TARGET_ALONE | {"model": "popularity"}),
    "ials": Variant("implicit ALS of the target", _TARGET_ALONE | _LINEAR | {"model": "ials"}),
    "ials_joined": Variant(
        "implicit ALS of both domains joined", _LINEAR | {"model": "ials", "joined": True}
    ),
    "lightgcn": Variant(
        "LightGCN, on the target domain alone", _TARGET_ALONE | _LINEAR | _LIGHTGCN
    ),
    "ease": Variant("EASE of the target", _TARGET_ALONE | {"model": "ease"}),
    "ease_joined": Variant("EASE of both domains joined", {"model": "ease", "joined": True}),
    "emcdr": Variant(
        "EMCDR: factors of each domain, and a linear map for users of the source alone",
        _LINEAR | {"model": "emcdr"},
    ),
    "emcdr_mlp": Variant(
        "EMCDR with a hidden layer in its map",
        _LINEAR | {"model": "emcdr", "map_hidden": 128},  # twice the factors, as its authors have
    ),
    "ease_bridged": Variant(
        "EASE of the target with the source as a bridge", {"model": "ease_bridged"}
    ),
}
PUBLISHED = {
    "published": Variant(
        "CoNet-lasso by the procedure of the authors' code", _PUBLISHED_CONET | {"l1": 0.1}
    ),
    "published_conet": Variant("CoNet by the procedure of the authors' code", _PUBLISHED_CONET),
    "published_mlp": Variant(
        "the MLP by the procedure of the authors' code", _ONE_TOWER | _PUBLISHED
    ),
}
VARIANTS: dict[str, Variant] = RECIPE | PAPER | FOOTNOTES | REFERENCES | PUBLISHED

OLD_NAMES = {
    "ours": "recipe",
    "ours_conet": "recipe_conet",
    "ours_mlp": "recipe_mlp",
    "ours_mlp_joined": "recipe_joint_mlp",
}
