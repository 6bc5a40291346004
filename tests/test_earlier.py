"""Runs that go on with new data: what they take over by id, what they say, what they refuse."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import tiny, without_seconds

from conet_jax.data.load import load_dataset
from conet_jax.data.prepare import prepare
from conet_jax.errors import InputError
from conet_jax.run import earlier, tune
from conet_jax.run.experiment import for_inference, make_experiment, untuned
from conet_jax.run.fit import fit
from conet_jax.run.start import initial_state
from conet_jax.run.workdir import restore

RECIPE = dict(folds=2, ials_sweeps=4, fold_sweeps=1, ials_trials=4)


def rows(users, items, seed):
    """Every user with eight items of some taste."""
    rng = np.random.default_rng(seed)
    found = {"user": [], "item": []}
    for user in range(users):
        liked = rng.permutation(np.arange(user % 4, items, 4))[:8]
        found["user"] += [f"u{user:03d}"] * len(liked)
        found["item"] += [f"i{item:03d}" for item in liked]
    return found


def within(frame, users, items):
    """The rows of the first users and items."""
    kept = [
        at
        for at, (user, item) in enumerate(zip(frame["user"], frame["item"], strict=True))
        if user < f"u{users:03d}" and item < f"i{items:03d}"
    ]
    return {name: [values[at] for at in kept] for name, values in frame.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared data: ``old``, and ``new`` with more users and items between those of before."""
    folder = tmp_path_factory.mktemp("earlier")
    target, source = rows(80, 80, 0), rows(80, 60, 1)
    both = within(target, 60, 64), within(source, 60, 60)
    prepare(target, source, candidates=20, out=folder / "new")
    prepare(*both, candidates=20, out=folder / "old")
    return folder


def config_of(variant, folder, data, **fields):
    config = tiny(variant, **{"epochs": 2, **(RECIPE if "recipe" in variant else {}), **fields})
    config.data.dir = str(folder / data)
    return config


@pytest.fixture(scope="module", params=["lasso", "ials_joined", "recipe", "recipe_joint_mlp"])
def run(request, folder):
    """A finished run on the old data: (variant, its folder)."""
    workdir = folder / request.param
    fit(config_of(request.param, folder, "old"), workdir, quiet=True)
    return request.param, workdir


def taken_over(variant, workdir, folder, data="new"):
    config = config_of(variant, folder, data)
    experiment = untuned(config, load_dataset(config))
    return experiment, earlier.load(workdir, experiment)


def test_rows_are_those_of_the_same_ids(run, folder):
    variant, workdir = run
    experiment, before = taken_over(variant, workdir, folder)
    old, params, _ = restore(workdir)
    old, params = for_inference(old, params)
    for name, known in before.tables.items():
        ids = {"user": "user_ids"}.get(name, f"{name}_ids")
        there, here = getattr(old.dataset, ids), getattr(experiment.dataset, ids)
        assert set(here[known.ids]) == set(here) & set(there)
        assert before.record["known"][name] == len(known.ids) <= len(here)
        for row, values in zip(known.ids, known.values, strict=True):
            at = list(there).index(here[row])
            np.testing.assert_array_equal(values, np.asarray(params.tables[name])[at])


def test_a_start_has_what_is_known_and_draws_the_rest(folder, tmp_path):
    fit(config_of("lasso", folder, "old"), tmp_path / "w", quiet=True)
    experiment, before = taken_over("lasso", tmp_path / "w", folder)
    drawn = experiment.params(initial_state(experiment))
    params = experiment.params(initial_state(experiment._replace(earlier=before)))
    for leaf, known in zip(*map(jax.tree.leaves, (params.dense, before.dense)), strict=True):
        np.testing.assert_array_equal(leaf, known)
    for name, known in before.tables.items():
        new = np.setdiff1d(np.arange(len(drawn.tables[name])), known.ids)
        np.testing.assert_array_equal(params.tables[name][known.ids], known.values)
        np.testing.assert_array_equal(params.tables[name][new], drawn.tables[name][new])


def test_factors_stay_where_the_towers_know_them(folder, tmp_path):
    """Other draws end in other directions; those that go on end near where they were."""
    fit(config_of("recipe", folder, "old"), tmp_path / "w", quiet=True)
    experiment, before = taken_over("recipe", tmp_path / "w", folder)
    experiment = experiment.tuned(before.constants)
    known = before.tables["target_item"]

    def cosine(experiment):
        table = experiment.params(initial_state(experiment)).tables["target_item"]
        whole = np.asarray(table)[experiment.config.folds :: experiment.config.folds + 1]
        here, there = whole[known.ids, :-1], known.values[:, :-1]
        return np.sum(here * there) / np.linalg.norm(here) / np.linalg.norm(there)

    assert cosine(experiment._replace(earlier=before)) > 0.85
    for seed in (1, 2, 3):
        other = experiment.member(config_of("recipe", folder, "new", seed=seed))
        assert cosine(other) < 0.5
    new = np.setdiff1d(np.arange(experiment.sizes.users), before.tables["user"].ids)
    start = experiment.params(initial_state(experiment._replace(earlier=before))).tables["user"]
    whole = np.asarray(start)[experiment.config.folds :: experiment.config.folds + 1]
    assert np.abs(whole[new, :8]).max(axis=1).min() > 0  # new users are solved for


def test_a_run_says_what_it_started_from(run, folder, tmp_path, monkeypatch, capsys):
    variant, workdir = run
    monkeypatch.setattr(tune, "search", None)  # the constants are those of before
    result = fit(config_of(variant, folder, "new"), tmp_path / "w", start_from=workdir)
    record = result["started_from"]
    assert record["workdir"] == str(workdir) and record["known"]["user"] == 60
    stored = json.loads((tmp_path / "w" / "config.json").read_text())
    assert stored["started_from"] == record
    said = capsys.readouterr().out
    assert f"start: {workdir}, epoch {record['best_epoch']}; it knows" in said
    assert "60 rows of user" in said
    experiment, _, _ = restore(tmp_path / "w")
    if "recipe" in variant:
        there = restore(workdir)[0]
        assert result["tuned"]["trials"] == 0
        assert experiment.config.ials_alpha == there.config.ials_alpha


def test_it_begins_better_than_from_nothing(folder, tmp_path):
    first = {}
    fit(config_of("ials", folder, "old", epochs=8), tmp_path / "old", quiet=True)
    for name, start_from in (("drawn", None), ("known", tmp_path / "old")):
        config = config_of("ials", folder, "new", epochs=1)
        result = fit(config, tmp_path / name, quiet=True, start_from=start_from)
        first[name] = result["valid_warm"]["ndcg@10"]
    assert first["known"] > first["drawn"]


def test_it_goes_on_to_the_same_result_without_the_earlier_run(folder, tmp_path):
    fit(config_of("ials_joined", folder, "old"), tmp_path / "old", quiet=True)
    config = config_of("ials_joined", folder, "new", epochs=3)
    whole = fit(config, tmp_path / "whole", quiet=True, start_from=tmp_path / "old")
    short = config_of("ials_joined", folder, "new", epochs=1)
    fit(short, tmp_path / "parts", quiet=True, start_from=tmp_path / "old")
    shutil.rmtree(tmp_path / "old")
    parts = fit(config, tmp_path / "parts", quiet=True, start_from=tmp_path / "old")
    assert without_seconds(parts) == without_seconds(whole)
    for start_from in (None, tmp_path / "other"):
        with pytest.raises(InputError, match="it started from .*/old, and this run from"):
            fit(config, tmp_path / "parts", quiet=True, start_from=start_from)


def test_what_a_command_that_came_to_nothing_had_found_is_forgotten(folder, tmp_path):
    fit(config_of("ials", folder, "old"), tmp_path / "old", quiet=True)
    config = config_of("ials", folder, "new", ials_trials=2)
    fit(config, tmp_path / "w", quiet=True, start_from=tmp_path / "old")
    shutil.rmtree(tmp_path / "w" / "checkpoints")
    result = fit(config, tmp_path / "w", quiet=True)
    assert "started_from" not in result and result["tuned"]["trials"] == 2


@pytest.mark.parametrize(
    ("variant", "fields", "what"),
    [
        ("mlp", {}, "is a run of config.model=ials: expected config.model=mlp"),
        ("ials", {"layers": (8, 4)}, r"tables/target_item is \(8,\) where \(4,\) is expected"),
        ("popularity", {}, "config.model=popularity has a closed form"),
    ],
)
def test_runs_that_do_not_fit_are_refused(folder, tmp_path, variant, fields, what):
    if not (folder / "ials").exists():
        fit(config_of("ials", folder, "old"), folder / "ials", quiet=True)
    config = config_of(variant, folder, "new", **fields)
    with pytest.raises(InputError, match=what):
        fit(config, tmp_path / "w", quiet=True, start_from=folder / "ials")


def test_constants_as_given_are_taken(folder, tmp_path):
    fit(config_of("ials", folder, "old"), tmp_path / "old", quiet=True)
    config = config_of("ials", folder, "new", ials_alpha=7.0)
    result = fit(config, tmp_path / "w", quiet=True, start_from=tmp_path / "old")
    assert "tuned" not in result
    assert make_experiment(config, load_dataset(config)).config.ials_alpha == 7.0
