"""A column of counts as weights: read, summed, stored, and what models make of them."""

import gzip
import json

import jax
import numpy as np
import polars as pl
import pytest
from helpers import SMALL, tiny
from test_baselines import (
    CONFIDENCE,
    LAMBDA,
    SOURCE_WEIGHT,
    items_of,
    matrix_of,
    random_domains,
)
from test_prepare import prepare as command

from conet_jax import devices
from conet_jax.data import prepare, recbole, store, synthetic
from conet_jax.data.load import drop_interactions
from conet_jax.data.types import Dataset, content_hash
from conet_jax.errors import InputError
from conet_jax.models import ials, out_of_fold
from conet_jax.run import tune
from conet_jax.run.experiment import fit_pairs, interactions_on, make_experiment, sizes_of
from conet_jax.run.fit import fit
from conet_jax.studies.transfer import other_source
from conet_jax.train import sampling
from conet_jax.train.interactions import to_device
from conet_jax.train.step import joint_objective


def plays():
    """Rows (user, item, plays) of two domains, some pairs several times, and each pair's sum."""
    found = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        rows = [
            (f"u{user:02}", f"{'TS'[seed]}{item:02}", int(rng.integers(1, 300)))
            for user in range(24)
            for item in rng.choice(25, 6)
        ]
        found.append([rows[at] for at in rng.permutation(len(rows))])
    return found


SONGS, FILMS = plays()


def sums(rows):
    total = {}
    for user, item, count in rows:
        total[user, item] = total.get((user, item), 0) + count
    return total


def frame(rows, name="plays"):
    columns = ("user_id", "item_id", name)[: len(rows[0])]
    return pl.DataFrame(rows, schema=columns, orient="row")


def weights_of(data: Dataset, domain: str) -> dict:
    ids, rows = getattr(data, f"{domain}_item_ids"), getattr(data, domain)
    users = np.repeat(np.arange(data.num_users), np.diff(rows.indptr))
    listed = zip(users, rows.indices, rows.weights, strict=True)
    return {(data.user_ids[u], ids[i]): w for u, i, w in listed}


def weighed(data: Dataset, seed=0, domains=("target", "source")) -> Dataset:
    """The data with log-normal weights."""
    rng = np.random.default_rng(seed)
    for domain in domains:
        rows = getattr(data, domain)
        weights = np.exp(rng.standard_normal(len(rows.indices))).astype(np.float32)
        data = data._replace(**{domain: rows._replace(weights=weights)})
    return data._replace(meta=data.meta | {"hash": content_hash(data)})


@pytest.fixture(scope="module")
def data():
    return weighed(synthetic.dataset(**SMALL)[0])


# Reading.


def shapes(folder, rows, name):
    """The rows in many shapes."""
    table = frame(rows)
    table.write_csv(folder / f"{name}.csv")
    table.write_csv(folder / f"{name}.tsv", separator="\t")
    table.write_csv(folder / f"{name}_quoted.csv", quote_style="always")
    table.write_ndjson(folder / f"{name}.jsonl")
    (folder / f"{name}.json").write_text(json.dumps(table.to_dicts()))
    table.write_parquet(folder / f"{name}.parquet")
    table.with_columns(plays=pl.col("plays").cast(pl.String)).write_parquet(
        folder / f"{name}_text.parquet"
    )
    names = [".csv", ".tsv", "_quoted.csv", ".jsonl", ".json", ".parquet", "_text.parquet"]
    return [table, *(str(folder / f"{name}{ending}") for ending in names)]


def test_weights_of_a_pair_add_up_in_every_shape_of_file(tmp_path):
    pairs = zip(shapes(tmp_path, SONGS, "songs"), shapes(tmp_path, FILMS, "films"), strict=True)
    made = [prepare.prepare(*both, candidates=3, weight_column="Plays") for both in pairs]
    for domain, rows in (("target", SONGS), ("source", FILMS)):
        want, found = sums(rows), weights_of(made[0], domain)
        assert found and all(want[pair] == weight for pair, weight in found.items())
    assert len({data.meta["hash"] for data in made}) == 1
    assert made[0].meta["reading"]["target"]["columns"]["weight"] == "plays"


def test_weights_do_not_depend_on_the_order_of_rows_nor_on_how_plays_are_split_into_rows():
    rows = [(user, item, count / 7) for user, item, count in SONGS]  # whose sums round
    one, two = (
        prepare.prepare(frame(some), frame(FILMS), candidates=3, weight_column="plays")
        for some in (rows, rows[::-1])
    )
    assert one.meta["hash"] == two.meta["hash"]
    counted = {"candidates": 3, "target_weight_column": "plays"}
    repeated = [(user, item, 1) for user, item, count in SONGS for _ in range(count)]
    split, whole = (
        prepare.prepare(frame(some), frame(FILMS), **counted) for some in (repeated, SONGS)
    )
    assert split.meta["hash"] == whole.meta["hash"]
    assert split.source.weights is None


def test_without_the_flag_a_column_of_counts_changes_nothing():
    plain = [[row[:2] for row in rows] for rows in (SONGS, FILMS)]
    without, with_column, none = (
        prepare.prepare(frame(target), frame(source), candidates=3, **options)
        for target, source, options in (
            (*plain, {}),
            (SONGS, FILMS, {}),
            (SONGS, FILMS, {"weight_column": "none"}),
        )
    )
    assert without.target.weights is without.source.weights is None
    assert without.meta["hash"] == with_column.meta["hash"] == none.meta["hash"]


def test_weights_follow_their_pairs_through_the_core_the_twins_and_the_split():
    want = {"target": sums(SONGS), "source": sums(FILMS)}
    times = [[(*row, n) for n, row in enumerate(rows)] for rows in (SONGS, FILMS)]
    schema = ("user_id", "item_id", "plays", "timestamp")
    tables = [pl.DataFrame(rows, schema=schema, orient="row") for rows in times]
    for options in (
        {"min_user_items": 3, "min_item_users": 4},
        {"drop_twins": True, "twin_jaccard": 0.4, "twin_users": 2},
        {"split": "latest"},
        {"split": "time", "cutoff": "0.7"},
        {"users": "all", "hold_out": "both", "max_user_items": 9},
    ):
        made = prepare.prepare(*tables, candidates=2, weight_column="plays", **options)
        for domain, all_pairs in want.items():
            found = weights_of(made, domain)
            assert found and all(all_pairs[pair] == w for pair, w in found.items())
    assert made.seen is None or made.seen.weights is None


def test_weights_of_rows_below_the_threshold_count_where_the_latest_rating_is_above():
    rows = [("u0", "T0", 2, 10), ("u0", "T0", 5, 3), ("u0", "T1", 5, 1), ("u0", "T1", 2, 1)]
    rows += [("u0", f"T{n}", 5, n) for n in (2, 3)] + [(f"u{n}", f"T{n}", 5, 1) for n in (4, 5)]
    rows += [("u4", "T1", 5, 2)]
    target = pl.DataFrame(rows, schema=("user", "item", "rating", "plays"), orient="row")
    source = [(f"u{n}", f"S{m}", 1) for n in (0, 4, 5) for m in range(n, n + 2)]
    made = prepare.prepare(target, frame(source), candidates=1, target_weight_column="plays")
    found = weights_of(made, "target")
    want = {("u0", "T0"): 13, ("u0", "T2"): 2, ("u0", "T3"): 3, ("u4", "T1"): 2}
    want |= {(f"u{n}", f"T{n}"): 1 for n in (4, 5)}
    assert found and found.items() <= want.items()
    assert made.seen is not None and made.seen.weights is None


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e400", "1e31", "1e-31", "many", ""])
@pytest.mark.parametrize("quoted", [False, True])
def test_a_weight_that_is_not_above_zero_is_a_bad_row(value, quoted, tmp_path):
    lines = ["user_id,item_id,plays", *(",".join(map(str, row)) for row in SONGS)]
    lines[5] = f"u00,T00,{value}"
    if quoted:
        lines[7] = '"u00","T01",1'
    (tmp_path / "songs.csv").write_text("\n".join(lines) + "\n")
    given = str(tmp_path / "songs.csv"), frame(FILMS)
    options = {"candidates": 3, "target_weight_column": "plays"}
    with pytest.raises(InputError, match=r"songs.csv:6: .*weight.*--skip_bad_rows"):
        prepare.prepare(*given, **options)
    report = prepare.prepare(*given, skip_bad_rows=True, **options).meta["audit"]["target"]
    assert report["bad_rows"] == 1 and report["rows"] == len(SONGS)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), None])
def test_a_weight_that_is_not_above_zero_is_a_bad_row_of_a_table(value):
    table = frame(SONGS).with_columns(pl.col("plays").cast(pl.Float64))
    table[4, "plays"] = value
    with pytest.raises(InputError, match=r"row 5: .*weight"):
        prepare.prepare(table, frame(FILMS), candidates=3, target_weight_column="plays")


def test_the_command_reads_weights_and_says_so(tmp_path):
    for name, rows in (("songs", SONGS), ("films", FILMS)):
        frame(rows).write_csv(tmp_path / f"{name}.csv")
    files = {"target": tmp_path / "songs.csv", "source": tmp_path / "films.csv"}
    done = command(**files, out=tmp_path / "out", candidates=11, weight_column="plays")
    assert done.returncode == 0, done.stderr
    assert "user 'user_id', item 'item_id', weight 'plays'" in done.stdout
    assert store.load(tmp_path / "out").source.weights is not None


def test_another_file_of_the_source_is_read_without_weights_and_they_are_no_rating(tmp_path):
    made = prepare.prepare(
        frame(SONGS), frame(FILMS, "score"), candidates=3, source_weight_column="score"
    )
    for columns in (["user_id", "item_id", "score"], ["user_id", "item_id"]):
        frame(FILMS, "score").select(columns).write_csv(tmp_path / "more.csv")
        found = prepare.positives_of(made.meta, "source", str(tmp_path / "more.csv")).collect()
        assert set(found.rows()) == set(sums(FILMS))


# Storing.


def test_weights_come_back_and_data_without_have_no_file_of_them(data, tmp_path):
    store.save(data, tmp_path / "with")
    back = store.load(tmp_path / "with")
    assert back.meta["hash"] == data.meta["hash"]
    for domain in ("target", "source"):
        np.testing.assert_array_equal(getattr(back, domain).weights, getattr(data, domain).weights)
    store.save(synthetic.dataset(**SMALL)[0], tmp_path / "without")
    assert not list((tmp_path / "without").glob("*weights*"))
    assert store.load(tmp_path / "without").target.weights is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:-1], "weights of the wrong shape"),
        (lambda w: -w, "weights that are not above 0"),
        (lambda w: w * np.float32(np.inf), "weights that are not above 0"),
        (lambda w: 2 * w, "does not match its hash"),
        (lambda w: w.astype(np.float64), "not an array of type"),
        (None, "does not match its hash"),
    ],
)
def test_altered_weights_are_told(data, change, message, tmp_path):
    store.save(data, tmp_path / "data")
    file = tmp_path / "data" / "source_weights.npy"
    if change is None:
        file.unlink()
    else:
        np.save(file, change(np.load(file)))
    with pytest.raises(InputError, match=message):
        store.load(tmp_path / "data")


def test_weights_go_to_recbole_s_files_and_back(data, tmp_path):
    alone = weighed(synthetic.dataset(**SMALL)[0], domains=("source",))
    for made, name in ((data, "both"), (alone, "one")):
        recbole.save(made, tmp_path / name)
        back = recbole.load(tmp_path / name)
        assert back.meta["hash"] == made.meta["hash"]
        packed = tmp_path / name / "target" / "target.train.inter"
        packed.write_bytes(gzip.compress(packed.read_bytes()))
        assert recbole.load(tmp_path / name).meta["hash"] == made.meta["hash"]
    file = tmp_path / "both" / "source" / "source.inter"
    text = file.read_text().splitlines()
    file.write_text("\n".join([*text[:4], text[4].rpartition("\t")[0] + "\t0", *text[5:], ""]))
    with pytest.raises(InputError, match=r"source.inter:5: bad weight '0'"):
        recbole.load(tmp_path / "both")


def test_weights_stay_with_their_pairs_where_interactions_are_taken_away_or_given_to_others(data):
    before = weights_of(data, "target")
    left = weights_of(drop_interactions(data, 2), "target")
    assert len(left) < len(before) and left.items() <= before.items()
    other = other_source(data)
    assert sorted(other.source.weights) == sorted(data.source.weights)
    by_item = {}
    for (_, item), weight in weights_of(data, "source").items():
        by_item.setdefault(item, set()).add(weight)
    assert all(weight in by_item[item] for (_, item), weight in weights_of(other, "source").items())


# Models.


def with_weights(interactions, domains, seed=2):
    """Random domains whose pairs in some have weights of mean 1, exact in float32."""
    rng = np.random.default_rng(seed)
    found = {}
    for domain, own in interactions.items():
        weights = None
        if domain in domains:
            weights = rng.integers(1, 9, len(own.users)).astype(np.float32) / 4
        found[domain] = own.replace(weights=weights)
    return found


def weight_matrix(interactions, domains, users):
    parts = []
    for domain in domains:
        own = interactions[domain]
        part = np.zeros((users, own.num_items))
        part[own.users, own.items] = 1 if own.weights is None else own.weights
        parts.append(part)
    return np.concatenate(parts, axis=1)


def weighed_rows(r, k, fixed, weights):
    """For each row of r the minimiser of sum w (1 + alpha k) (r - x^T y)^2 + lambda |x|^2."""
    rows = []
    for own, plays, w in zip(r, k, weights, strict=True):
        c = w * (1 + CONFIDENCE * plays)
        normal = fixed.T @ np.diag(c) @ fixed + LAMBDA * np.eye(fixed.shape[1])
        rows.append(np.linalg.solve(normal, fixed.T @ (c * own)))
    return np.stack(rows)


@pytest.mark.parametrize("at_once", [None, 16])
@pytest.mark.parametrize(
    ("joined", "domains"), [(False, ["target"]), (True, ["target", "source"]), (True, ["source"])]
)
def test_ials_with_weights_solves_its_normal_equations(monkeypatch, joined, domains, at_once):
    monkeypatch.setattr(ials, "_STEPS", ials._TO_THE_END)
    if at_once:
        monkeypatch.setattr(ials, "_PAIRS_AT_ONCE", at_once)
    interactions, sizes = random_domains()
    interactions = with_weights(interactions, domains)
    options = ials.Options((8, 4), joined, LAMBDA, CONFIDENCE, SOURCE_WEIGHT)
    read = ("target", "source") if joined else ("target",)
    r = matrix_of(interactions, read, sizes.users)
    k = weight_matrix(interactions, read, sizes.users)
    weights = np.ones_like(r)
    weights[:, sizes.target_items :] = SOURCE_WEIGHT
    model = ials.build(options)
    with jax.enable_x64(True):
        params = model.init(jax.random.key(0), sizes)
        sweep = model.sweeper(interactions, sizes)
        for _ in range(3):
            before, params = items_of(params), sweep(params)
            x, y = np.asarray(params.tables["user"]), items_of(params)
            np.testing.assert_allclose(
                x, weighed_rows(r, k, before, weights), rtol=1e-9, atol=1e-12
            )
            np.testing.assert_allclose(
                y, weighed_rows(r.T, k.T, x, weights.T), rtol=1e-9, atol=1e-12
            )
        pairs = ials.matrix(interactions, sizes, joined=joined)
        alone = ials.users_of(pairs, params.tables, options, ("target",))
    weights[:, sizes.target_items :] = 0
    np.testing.assert_allclose(alone, weighed_rows(r, k, y, weights), rtol=1e-9, atol=1e-12)


def test_ials_of_equal_weights_is_that_without_and_of_doubled_ones_that_of_twice_the_confidence():
    interactions, sizes = random_domains()
    options = ials.Options((8, 4), True, LAMBDA, CONFIDENCE, SOURCE_WEIGHT)
    with jax.enable_x64(True):
        for factor in (1, 2):
            equal = {
                d: own.replace(weights=np.full(len(own.users), factor, np.float32))
                for d, own in interactions.items()
            }
            one = ials.fit(equal, sizes, options, sweeps=4)
            two = ials.fit(
                interactions, sizes, options._replace(ials_alpha=factor * CONFIDENCE), sweeps=4
            )
            for name, table in one.items():
                np.testing.assert_allclose(table, two[name], rtol=1e-9, atol=1e-12)


def test_units_of_weights_do_not_count(data):
    seconds = data._replace(target=data.target._replace(weights=60 * data.target.weights))
    one, two = fit_pairs(data), fit_pairs(seconds)
    np.testing.assert_allclose(one["target"].weights, two["target"].weights, rtol=1e-6)
    assert np.mean(one["target"].weights) == pytest.approx(1, rel=1e-6)
    extreme = to_device(
        np.array([0, 2]), np.array([0, 1]), 3, weights=np.array([1e-30, 1e30], np.float32)
    )
    assert np.isfinite(extreme.weights).all() and (np.asarray(extreme.weights) > 0).all()
    assert to_device(np.array([0, 0]), np.array([], int), 3, weights=np.array([])).weights.size == 0


def test_out_of_fold_factors_are_fitted_with_the_weights_of_the_pairs_that_are_left(data):
    interactions, sizes = fit_pairs(data), sizes_of(data)
    options, folds = ials.Options((8,), True, 1.0, 10.0, 0.5), 3
    tables = out_of_fold.fit(
        interactions, sizes, options, folds=folds, views=(("source",),), sweeps=2, fold_sweeps=1
    )
    whole = ials.fit(interactions, sizes, options, sweeps=2)
    for fold in range(folds):
        kept = {}
        for domain, own in interactions.items():
            keep = np.arange(len(own.items)) % folds != fold
            kept[domain] = ials.Pairs(
                *(np.asarray(column)[keep] for column in (own.users, own.items, own.weights))
            )
        factors = ials.fit(kept, sizes, options, sweeps=1, start=whole)
        for domain in ("target", "source"):
            table = np.asarray(tables[f"{domain}_item"]).reshape(-1, folds + 1, 5)[:, fold, :4]
            np.testing.assert_allclose(table, factors[f"{domain}_item"], rtol=1e-4, atol=1e-6)
        y, own = np.asarray(factors["source_item"], np.float64), kept["source"]
        views = np.asarray(tables["user"]).reshape(-1, folds + 1, 5)[:, fold]
        for user in range(0, sizes.users, 7):
            k = own.weights[own.users == user]
            mine = y[own.items[own.users == user]]
            normal = np.eye(4) + 0.5 * (y.T @ y + 10 * mine.T @ np.diag(k) @ mine)
            best = np.linalg.solve(normal, 0.5 * (1 + 10 * k) @ mine)
            np.testing.assert_allclose(views[user, :4], best, rtol=1e-3, atol=1e-4)
            # Counts are of pairs.
            counts = [
                np.bincount(p.users, minlength=sizes.users) for p in (own, interactions["source"])
            ]
            want = np.log1p(counts[0][user]) - np.log1p(counts[1]).mean()
            assert views[user, 4] == pytest.approx(want, abs=1e-5)


def test_the_search_for_constants_fits_with_weights(data):
    config = tiny("ials_joined", layers=(8, 4), epochs=2, ials_trials=3)
    found = [
        tune.search(config, data, fit_pairs(some)).ndcg
        for some in (data, synthetic.dataset(**SMALL)[0])
    ]
    assert found[0] != found[1]


@pytest.mark.parametrize("domains", [("target", "source"), ("source",)])
@pytest.mark.parametrize("pairing", ["random", "views", "same_user", None, "pairs"])
def test_an_observed_example_has_the_weight_of_its_pair_and_a_negative_1(pairing, domains):
    data = weighed(synthetic.dataset(**SMALL)[0], domains=domains)
    interactions = interactions_on(data, devices.one_device())
    both = ("target",) if pairing in (None, "pairs") else ("target", "source")
    plan = sampling.plan_epoch(
        interactions, domains=both, pairing=pairing, negatives=2, batch_size=200
    )
    plain = {d: own.replace(weights=None) for d, own in interactions.items()}
    sample = jax.jit(sampling.sample_step, static_argnums=4)
    for step in (0, plan.steps - 1):  # the last has padding
        batch, without = (
            sample(jax.random.key(0), 0, step, some, plan) for some in (interactions, plain)
        )
        for domain in both:
            own, found = interactions[domain], getattr(batch, domain)
            k = np.ones(len(own.users)) if own.weights is None else np.asarray(own.weights)
            of = dict(zip(zip(own.users.tolist(), own.items.tolist(), strict=True), k, strict=True))
            pairs = zip(found.users.tolist(), found.items.tolist(), strict=True)
            want = [
                of[pair] if label else 1.0
                for pair, label in zip(pairs, np.asarray(found.labels), strict=True)
            ]
            counted = np.asarray(getattr(without, domain).weights)
            assert set(counted) <= {0.0, 1.0}
            np.testing.assert_allclose(found.weights, counted * want, rtol=1e-6)
            np.testing.assert_array_equal(found.items, getattr(without, domain).items)


def test_the_first_loss_is_weighed(data):
    """Of all logits at 0, so that each example costs log 2: the count is the sum of weights."""
    config = tiny("mlp", batch_size=2000, negatives=1)
    experiment = make_experiment(config, data)
    params = jax.tree.map(np.zeros_like, experiment.model.init(jax.random.key(0), sizes_of(data)))
    batch = sampling.sample_step(jax.random.key(0), 0, 0, experiment.interactions, experiment.plan)
    rows = {n: params.tables[n][ids] for n, ids in experiment.model.lookups(batch).items()}
    value, found = joint_objective(experiment.model, params.dense, rows, batch, experiment.hyper)
    pairs = len(data.target.indices)
    assert found["target_count"] == pytest.approx(2 * pairs, rel=1e-5)  # weights of mean 1, and 1
    assert found["target_loss"] == pytest.approx(2 * pairs * np.log(2), rel=1e-5)
    assert value == found["target_loss"]


@pytest.mark.parametrize("variant", ["ease", "ease_joined", "popularity"])
def test_counts_of_pairs_alone_are_what_some_models_know(variant, data, tmp_path):
    results = [
        fit(tiny(variant), tmp_path / str(at), dataset=some, quiet=True)["test"]
        for at, some in enumerate((data, synthetic.dataset(**SMALL)[0]))
    ]
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["recipe", "lasso", "bprmf", "cmf", "fm", "ials"])
def test_weights_change_what_others_learn_and_a_resumed_run_is_the_run(variant, data, tmp_path):
    fields = {"layers": (8, 4), "epochs": 2}
    one = fit(tiny(variant, **fields), tmp_path / "one", dataset=data, quiet=True)
    fit(tiny(variant, **fields | {"epochs": 1}), tmp_path / "two", dataset=data, quiet=True)
    two = fit(tiny(variant, **fields), tmp_path / "two", dataset=data, quiet=True)
    assert one["valid"] == two["valid"]
    rows = [json.loads((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[0])]
    plain = synthetic.dataset(**SMALL)[0]
    fit(tiny(variant, **fields | {"epochs": 1}), tmp_path / "plain", dataset=plain, quiet=True)
    rows += [json.loads((tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()[0])]
    drop = ("seconds", "rows_per_second")
    rows = [{key: value for key, value in row.items() if key not in drop} for row in rows]
    assert rows[0] != rows[1]
