"""The start that tunes itself: what is searched, what a run keeps of it, what it is worth."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import SMALL, tiny, without_seconds
from ml_collections import ConfigDict

from conet_jax import models
from conet_jax.config import completed, default_config, validate
from conet_jax.data import prepare, synthetic
from conet_jax.data.types import trained_items, warm
from conet_jax.errors import InputError
from conet_jax.models import ials
from conet_jax.run import tune
from conet_jax.run.experiment import fit_pairs, make_experiment, sizes_of
from conet_jax.run.fit import fit
from conet_jax.run.start import initial_state
from conet_jax.run.workdir import restore
from conet_jax.studies import search
from conet_jax.train import ranking

CONSTANTS = {"ials_regularization", "ials_alpha", "ials_source_weight"}


@pytest.fixture(scope="module")
def data():
    return synthetic.dataset(**SMALL)[0]


def tuning(variant="ials_joined", **fields):
    config = tiny(variant, **{"layers": (8, 4), "epochs": 2, "ials_trials": 6, **fields})
    config.data.synthetic = ConfigDict(SMALL)
    return config


def found(config, data):
    return tune.search(config, search.without_test(data), fit_pairs(data))


@pytest.mark.parametrize("trials", range(1, 40))
def test_rounds_are_of_all_trials(trials):
    counts, widths = zip(*tune._rounds(trials), strict=True)
    assert trials / 2 <= sum(counts) <= trials and min(counts) > 0
    assert widths[0] == 1.0 and list(widths) == sorted(widths, reverse=True)


@pytest.mark.parametrize("d", [2, 3])
def test_points_are_spread_evenly(d):
    low, high = np.arange(d) - 1.0, np.arange(d) + 1.0
    points = (tune._spread(64, low, high) - low) / (high - low)
    assert ((points >= 0) & (points <= 1)).all()
    for axis in points.T:  # each eighth of each axis has about eight: of random draws, 2 or 3
        assert np.histogram(axis, 8, (0, 1))[0].min() >= 5
    for along in range(d):  # and so has each quarter of a side of each face
        faces = np.histogram2d(points[:, along], points[:, along - 1], 4, [(0, 1)] * 2)[0]
        assert faces.min() >= 1


def ndcg_of(config, data, constants):
    """NDCG of the factorisation on warm validation, ranked with NumPy.

    For towers the best under a weight of log(1 + training pairs).
    """
    fields = models.factorisation(config).constants()
    options = models.factorisation(config)._replace(**{name: constants[name] for name in fields})
    tables = ials.fit(fit_pairs(data), sizes_of(data), options, sweeps=config.ials_sweeps)
    x, y = (np.asarray(tables[name], np.float64) for name in ("user", "target_item"))
    kept, mask = warm(data.valid, trained_items(data.target))
    valid = data.valid
    listed = np.concatenate([valid.items[:, None], valid.candidates], axis=1)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    dots = np.einsum("nd,ncd->nc", x[valid.users], y[listed])
    counts = np.log1p(np.bincount(data.target.indices, minlength=data.target.num_items))
    found = []
    for weight in (0.0, -0.1, -0.05, -0.02, 0.02, 0.05) if config.model != "ials" else (0.0,):
        scores = dots + weight * counts[listed]
        rank = ((scores[:, 1:] > scores[:, :1]) & mask).sum(1)
        found.append(np.where(rank < 10, 1 / np.log2(rank + 2), 0.0)[kept].mean())
    return max(found)


@pytest.mark.parametrize("variant", ["ials", "ials_joined", "recipe_mlp", "recipe"])
def test_what_is_found_is_the_ndcg_of_a_fit_with_these_constants(data, variant):
    config = tuning(variant)
    best = found(config, data)
    weight = {"ials_source_weight"} if variant in ("ials_joined", "recipe") else set()
    near = {"neighbour_weight"} if variant.startswith("recipe") else set()
    assert set(best.constants) == CONSTANTS - {"ials_source_weight"} | weight | near
    assert all(value == tune.rounded(value) for value in best.constants.values())
    given = {name: config[name] for name in best.constants}
    assert best.constants != given
    # Scores of f32 that tie here may not tie there.
    assert best.ndcg == pytest.approx(ndcg_of(config, data, best.constants), abs=2e-3)
    assert best.ndcg > ndcg_of(config, data, given)


@pytest.mark.parametrize(
    "variant",
    [
        "recipe",
        *(pytest.param(f"recipe_{v}", marks=pytest.mark.slow) for v in ("mlp", "joint_mlp")),
    ],
)
def test_the_weight_of_the_neighbours_is_the_best_at_the_start(data, variant):
    """The start's own logits, ranked as validation is: the towers hardly speak yet."""
    config = tuning(variant, output_scale=0.0)
    constants = found(config, data).constants
    assert constants["neighbour_weight"] in tune._WEIGHTS
    values = {}
    for weight in tune._WEIGHTS:
        given = tune.resolved(config, constants | {"neighbour_weight": weight})
        experiment = make_experiment(given, data)
        params = experiment.params(initial_state(experiment))
        _, (_, ranks) = ranking.rank_twice(
            experiment.model,
            params,
            experiment.interactions,
            data.valid,
            experiment.trained_items("target"),
        )
        values[weight] = ranking.summarize(ranks, k=10)["ndcg@10"]
    assert len(set(values.values())) > 1
    # The start here has drawn factors of its own.
    assert values[constants["neighbour_weight"]] > max(values.values()) - 0.01


def test_one_trial_is_the_constants_as_given(data):
    config = tuning(ials_trials=1)
    assert found(config, data).constants == {name: config[name] for name in CONSTANTS}


def test_the_seed_does_not_enter(data):
    assert found(tuning(seed=3), data)[:2] == found(tuning(), data)[:2]


def test_runs_of_a_study_that_ask_the_same_search_once(data, monkeypatch):
    asked = []
    tuning_of = tune.Tuning({}, 0.1, 6, 2.0)
    monkeypatch.setattr(tune, "_search", lambda what, *given: asked.append(what) or tuning_of)
    recipe = {"layers": (8, 4), "neighbours": 4}
    with tune.searching_once():
        for fields in ({}, {"seed": 3}, {"learning_rate": 0.1, "epochs": 5}):
            answer = found(tuning("recipe", **recipe, **fields), data)
            assert answer == tuning_of._replace(seconds=0.0 if fields else 2.0)
        assert len(asked) == 1
        others = [{"ials_trials": 7}, {"ials_sweeps": 9}, {"ials_alpha": 3.0}, {"eval_k": (5,)}]
        others += [{"layers": (16, 4)}, {"neighbours": 5}, {"inner_weight": 1.0}]
        for number, fields in enumerate(others, 2):
            found(tuning("recipe", **{**recipe, **fields}), data)
            assert len(asked) == number, fields
        for variant in ("recipe_mlp", "recipe_joint_mlp", "ials", "ials_joined"):
            found(tuning(variant, layers=(8, 4)), data)
        assert len(asked) == len(set(asked)) == number + 4
        found(tuning("recipe", **recipe), data._replace(meta=data.meta | {"hash": "other"}))
        assert len(asked) == number + 5
    found(tuning("recipe", **recipe), data)
    assert len(asked) == number + 6


def test_a_point_that_diverges_is_passed_over(data, monkeypatch):
    """Constants that no range has: the given point, whose scores overflow."""
    config = tuning()
    config.ials_regularization, config.ials_alpha = 1e-30, 1e38
    best = found(config, data)
    assert np.isfinite(best.ndcg) and best.constants["ials_alpha"] <= 1000


@pytest.mark.parametrize("name", sorted(CONSTANTS))
def test_constants_beside_a_search_for_them_are_refused(name):
    with pytest.raises(InputError, match=rf"config\.{name} is 3\.0, but config\.ials_trials=6"):
        validate(tuning(**{name: 3.0}))
    validate(tuning(**{name: 3.0, "ials_trials": 0}))
    validate(tuning("lasso", **{name: 3.0}))  # which has no factorisation


def test_a_weight_of_the_source_where_there_is_none_is_not_searched():
    validate(tuning("ials", ials_source_weight=3.0))


def never(*args, **kwargs):
    raise AssertionError("searched again")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "w"
    return workdir, fit(tuning(), workdir, dataset=data, quiet=True)


def test_a_run_keeps_what_it_has_found(run, data):
    workdir, result = run
    stored = json.loads((workdir / "config.json").read_text())
    best = found(tuning(), data)
    assert stored["tuned"] == {**best.constants, "ndcg@10": best.ndcg, "trials": 6}
    assert stored["ials_trials"] == 6 and stored["ials_alpha"] == tuning().ials_alpha
    assert result["tuned"] == stored["tuned"]
    assert result["config"] == json.loads(tuning().to_json())
    first, second = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    assert first["tuned"] == stored["tuned"] and first["seconds"]["search"] > 0
    assert "tuned" not in second


def test_a_run_is_that_of_its_constants(run, data, tmp_path):
    _, result = run
    constants = {name: result["tuned"][name] for name in CONSTANTS}
    same = fit(tuning(ials_trials=0, **constants), tmp_path / "w", dataset=data, quiet=True)
    assert "tuned" not in same
    for split in ("test", "valid", "test_warm", "valid_warm"):
        assert same[split] == result[split]


def test_a_run_that_goes_on_does_not_search_again(run, data, tmp_path, monkeypatch, capsys):
    _, result = run
    fit(tuning(epochs=1), tmp_path / "w", dataset=data, quiet=True)
    monkeypatch.setattr(tune, "search", never)
    resumed = fit(tuning(), tmp_path / "w", dataset=data)
    assert without_seconds(resumed) == without_seconds(result)
    assert "found before" in capsys.readouterr().out


def test_a_run_killed_after_its_search_keeps_it(run, data, tmp_path, monkeypatch):
    workdir, result = run
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_bytes((workdir / "config.json").read_bytes())
    monkeypatch.setattr(tune, "search", never)
    again = fit(tuning(), tmp_path / "w", dataset=data, quiet=True)
    assert without_seconds(again) == without_seconds(result)


def test_what_was_found_for_another_config_is_not_taken(run, data, tmp_path):
    workdir, _ = run
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_bytes((workdir / "config.json").read_bytes())
    result = fit(tuning(ials_trials=2), tmp_path / "w", dataset=data, quiet=True)
    assert result["tuned"]["trials"] == 2


def test_what_was_found_for_other_data_is_not_taken(run, tmp_path):
    workdir, result = run
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_bytes((workdir / "config.json").read_bytes())
    other = synthetic.dataset(**SMALL | {"seed": 1})[0]
    again = fit(tuning(), tmp_path / "w", dataset=other, quiet=True)
    assert again["tuned"] != result["tuned"]


def test_a_run_is_read_back_with_its_constants(run, monkeypatch):
    workdir, result = run
    monkeypatch.setattr(tune, "search", never)
    experiment, _, _ = restore(workdir)
    assert experiment.config.ials_trials == 0
    assert experiment.config.ials_alpha == result["tuned"]["ials_alpha"]


def test_a_search_that_never_ended_has_no_checkpoint(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "w")
    stored = json.loads((run[0] / "config.json").read_text())
    del stored["tuned"]
    (tmp_path / "w" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="holds no checkpoint yet"):
        restore(tmp_path / "w")


@pytest.mark.parametrize("tuned", [{}, [], {name: -1.0 for name in CONSTANTS}, {"ials_alpha": "x"}])
def test_a_damaged_finding_is_refused(run, tmp_path, tuned):
    stored = json.loads((run[0] / "config.json").read_text()) | {"tuned": tuned}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="cannot be read as a run's config"):
        restore(tmp_path)


def test_a_config_of_before_takes_its_constants_as_they_are(run):
    stored = json.loads((run[0] / "config.json").read_text())
    del stored["ials_trials"]
    assert completed(stored)["ials_trials"] == 0


def test_members_of_a_population_share_the_constants(data):
    config = tuning("recipe", folds=2, ials_sweeps=2, fold_sweeps=1)
    experiment = make_experiment(config, search.without_test(data))
    other = ConfigDict(config.to_dict() | {"seed": 1, "learning_rate": 0.1})
    member = experiment.member(other)
    assert member.config.seed == 1 and member.config.ials_trials == 0
    found = experiment.constants
    assert {name: member.config[name] for name in found} == found
    assert jax.random.key_data(member.key).tolist() != jax.random.key_data(experiment.key).tolist()


@pytest.mark.parametrize(
    "variant",
    ["ials_joined", *(pytest.param(v, marks=pytest.mark.slow) for v in ("ials", "recipe"))],
)
def test_small_data_are_not_below_popularity(variant, data_dir, tmp_path):
    """120 users: under the default constants, chosen on larger data, the recipe is near it."""
    cases = data_dir.parent / "cases"
    if not cases.is_dir():
        pytest.skip(f"{cases} is not here")
    data = prepare.prepare(str(cases / "books.csv"), str(cases / "movies.csv"), candidates=20)
    popular = fit(default_config("popularity"), tmp_path / "p", dataset=data, quiet=True)
    result = fit(default_config(variant), tmp_path / "w", dataset=data, quiet=True)
    assert result["test_warm"]["ndcg@10"] > 1.5 * popular["test_warm"]["ndcg@10"]
