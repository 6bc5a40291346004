"""Tables: their numbers from results made up, and a study from search to tables, interrupted."""

import importlib.util
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_launch import ROOT, assert_one_line_error, launch

from conet_jax import metrics
from conet_jax.config import default_config, validate
from conet_jax.data import synthetic
from conet_jax.data.load import drop_interactions, load_dataset
from conet_jax.errors import InputError
from conet_jax.published import Figure, Protocol
from conet_jax.run.fit import fit
from conet_jax.studies import full_run, markdown, population, search, statistics, table2, tables

# The numbers.


def runs(*values, valid=None, users=40, commands=()):
    """Runs with these NDCGs on test; metrics that are no metric of one ranking, to tell them."""
    results = []
    for value in values:
        test = {"hit_ratio@10": 2 * value, "ndcg@10": value, "mrr@10": value / 2}
        published = {name: x / 4 for name, x in test.items()}
        chosen = {"ndcg@10": value if valid is None else valid}
        results.append({"test_warm": test, "test": published, "valid_warm": chosen})
    noise = np.random.default_rng(round(1000 * sum(values))).normal(0, 0.1, users)
    return tables.Runs(results, np.mean(values) + noise, list(commands))


def method(*values, valid=None, trials=None, **drops):
    trials = trials or [{"valid_warm": {"ndcg@10": valid or values[0]}}]
    found = {0: runs(*values, valid=valid)} if values else {}
    found |= {int(name[1:]): drop for name, drop in drops.items()}
    return tables.Method(trials, [{}] * len(trials), search.best_trial(trials, 10), found)


def test_paper_gains_are_those_that_the_paper_prints():
    for data, gains in (("Mobile", (1.69, 2.83, 3.56)), ("Amazon", (6.45, 8.94, 7.65))):
        for at, gain in enumerate(gains):
            values = {name: row[at] for name, row in tables.PAPER[data].items()}
            best = max(values[name] for name in ("bprmf", "cmf", "fm", "mlp"))
            assert 100 * (values["lasso"] / best - 1) == pytest.approx(gain, abs=0.015)


def test_comparison_is_means_deviations_gain_and_tests():
    methods = {"lasso": method(0.30, 0.34), "mlp": method(0.20, 0.22), "recipe_mlp": method(0.25)}
    lasso, mlp, recipe_mlp = tables.comparison(methods, 10)
    assert lasso["warm"]["ndcg"]["mean"] == pytest.approx(0.32)
    assert lasso["warm"]["ndcg"]["std"] == pytest.approx(0.04 / math.sqrt(2))
    assert lasso["warm"]["hit_ratio"]["mean"] == pytest.approx(0.64)
    assert lasso["warm"]["mrr"]["mean"] == pytest.approx(0.16)
    assert lasso["published"]["ndcg"]["mean"] == pytest.approx(0.08)
    assert lasso["gain"] == pytest.approx(0.32 / 0.21 - 1)
    assert "gain" not in mlp and set(mlp["against"]) == {"recipe_mlp"}
    assert recipe_mlp["warm"]["ndcg"]["std"] is None and set(recipe_mlp["against"]) == {"mlp"}
    for other in ("mlp", "recipe_mlp"):
        test, both = lasso["against"][other], (methods["lasso"].runs[0], methods[other].runs[0])
        assert test["p"] == statistics.paired_t_test(both[0].ndcg, both[1].ndcg)
        expected = statistics.paired_bootstrap(both[0].ndcg, both[1].ndcg)
        assert (test["difference"], test["low"], test["high"], test["p_bootstrap"]) == expected
    assert lasso["paper"] == {
        "Mobile": [0.8547, 0.6802, 0.6431],
        "Amazon": [0.5338, 0.3424, 0.3351],
    }


def test_best_baseline_is_the_best_on_validation_not_on_test():
    tested = {
        "fm": runs(0.5, valid=0.1),
        "mlp": runs(0.3, valid=0.2),
        "recipe": runs(0.9, valid=0.9),
    }
    assert tables.best_baseline(tested, 10) == "mlp"
    assert tables.best_baseline({"recipe": runs(0.9)}, 10) is None


def test_method_whose_trials_all_failed_is_a_dash_with_its_reason():
    failed = method(trials=[{"failed": "too many items"}])
    report = a_report({"mlp": method(0.2, 0.3), "ease": failed})
    text = markdown.page(report)
    line = next(line for line in text.splitlines() if line.startswith("| ease |"))
    assert set(line.replace("ease", "").replace("|", "").split()) == {"-"}
    assert "ease failed: too many items" in text
    assert report["search"][1]["failed"] == 1 and report["search"][1]["overrides"] is None


def a_report(methods, drops=(0,), **fields):
    data = synthetic.dataset(
        num_users=40,
        num_target_items=130,
        num_source_items=120,
        target_interactions=2000,  # so many that every test item is warm
        source_interactions=300,
        candidates=20,
        seed=0,
    )[0]
    datasets = {drop: drop_interactions(data, drop) if drop else data for drop in drops}
    return tables.report(
        "x", datasets, methods, seeds=2, trials=1, k=10, command="python", **fields
    )


def test_published_figures_are_rows_of_their_own_without_tests():
    protocol = Protocol("a paper", "another draw", "99 negatives", "the best epoch on test")
    others = (Figure("LightGCN", 0.4, 0.25, 0.2, protocol), Figure("B", 0.3, 0.2, 0.1, protocol))
    report = a_report({"mlp": method(0.2, 0.3), "recipe_mlp": method(0.3)}, published=others)
    assert [row["method"] for row in report["comparison"]] == ["mlp", "recipe_mlp"]
    lines = markdown.page(report).splitlines()
    first = lines[: next(at for at, line in enumerate(lines) if line.startswith("## Search"))]
    rows = {line.split("|")[1].strip(): line for line in first if line.startswith("| ")}
    head = [cell.strip() for cell in rows["method"].split("|")]
    cells = [cell.strip() for cell in rows["LightGCN (published)"].split("|")]
    found = {name: cell for name, cell in zip(head, cells, strict=True) if cell not in ("", "-")}
    assert found == {
        "method": "LightGCN (published)",
        "all HR@10": "0.4000",
        "all NDCG@10": "0.2500",
        "all MRR@10": "0.2000",
    }
    said = [line for line in lines if line.startswith("Published: a paper. Data: another draw.")]
    assert len(said) == 1 and "the best epoch on test" in said[0]


@pytest.mark.parametrize("name", ["phone_sport", "sport_phone"])
def test_configs_have_published_figures_in_the_order_of_their_table(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [figure.method for figure in module.PUBLISHED][:3] == ["BPR", "LightGCN", "CoNet"]
    for figure in module.PUBLISHED:
        assert 0 < figure.mrr < figure.ndcg < figure.hit_ratio < 1
    validate(module.get_config("recipe"))


def test_cold_groups_share_out_the_users_and_average_them():
    rng = np.random.default_rng(0)
    degrees = rng.integers(1, 60, 500)
    degrees[:3] = 1, 19, 20
    ndcg = {"a": rng.random(500), "b": rng.random(500)}
    rows = tables.cold(ndcg, degrees, tables.TARGET_GROUPS)
    names = [row["interactions"] for row in rows]
    assert names == ["1", "2", "3-4", "5-9", "10-19", "20+", "all"]  # nobody has none
    assert sum(row["users"] for row in rows[:-1]) == rows[-1]["users"] == 500
    for row in rows[:-1]:
        low, _, high = row["interactions"].rstrip("+").partition("-")
        top = math.inf if "+" in row["interactions"] else int(high or low)
        inside = [int(low) <= degree <= top for degree in degrees]
        assert row["users"] == sum(inside)
        for name, values in ndcg.items():
            assert row["ndcg"][name] == pytest.approx(values[inside].mean())
    total = sum(row["users"] * row["ndcg"]["a"] for row in rows[:-1]) / 500
    assert rows[-1]["ndcg"]["a"] == pytest.approx(total)


def test_reduced_data_is_set_against_the_mlp_on_all_of_it():
    methods = {
        "recipe": method(0.4, d1=runs(0.36, 0.34), d2=runs(0.3)),
        "mlp": method(0.3, d1=runs(0.2)),
        "fm": method(0.9),
    }
    report = a_report(methods, (0, 1, 2))
    found = [(row["method"], row["dropped"]) for row in report["reduced"]]
    assert found == [("recipe", 0), ("recipe", 1), ("recipe", 2), ("mlp", 0), ("mlp", 1)]
    row = report["reduced"][1]
    assert row["gain"] == pytest.approx(0.35 / 0.3 - 1)
    expected = methods["recipe"].runs[1].ndcg, methods["mlp"].runs[0].ndcg
    assert row["against"]["mlp"]["p"] == statistics.paired_t_test(*expected)
    assert "against" not in report["reduced"][3]
    assert "| recipe | 1 |" in markdown.page(report)


# Less data.


@pytest.mark.parametrize("drop", [1, 2, 1000])
def test_drop_removes_so_many_of_each_user_and_leaves_one(drop):
    config = tiny()
    whole = load_dataset(config)
    config.data.drop = drop
    left = load_dataset(config)
    before, after = np.diff(whole.target.indptr), np.diff(left.target.indptr)
    np.testing.assert_array_equal(after, np.maximum(np.minimum(before, 1), before - drop))
    for user in range(whole.num_users):
        items = left.target.indices[left.target.indptr[user] : left.target.indptr[user + 1]]
        assert (np.diff(items) > 0).all()
        start, stop = whole.target.indptr[user : user + 2]
        assert set(items) <= set(whole.target.indices[start:stop])
    gone = int((before - after).sum())
    counts = (
        whole.meta["counts"]["target_interactions"] - left.meta["counts"]["target_interactions"]
    )
    assert counts == gone == len(whole.target.indices) - len(left.target.indices)
    assert left.meta["hash"] != whole.meta["hash"]
    assert left.target.indptr.dtype == whole.target.indptr.dtype
    for part in ("source", "valid", "test"):
        for ours, theirs in zip(getattr(left, part), getattr(whole, part), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_drop_is_drawn_at_random_once_and_in_steps():
    whole = load_dataset(tiny())
    one, two = (drop_interactions(whole, drop) for drop in (1, 2))

    def pairs(data):
        users = np.repeat(np.arange(data.num_users), np.diff(data.target.indptr))
        return set(zip(users.tolist(), data.target.indices.tolist(), strict=True))

    assert pairs(two) < pairs(one) < pairs(whole)
    assert one.meta["hash"] == drop_interactions(whole, 1).meta["hash"]
    many = np.diff(whole.target.indptr) > 3
    places = [
        np.searchsorted(
            whole.target.indices[whole.target.indptr[user] : whole.target.indptr[user + 1]],
            [item for of, item in pairs(whole) - pairs(one) if of == user],
        )[0]
        for user in np.flatnonzero(many)
    ]
    assert len(set(places)) > 3  # neither always the first nor always the last


@pytest.mark.parametrize("drop", [-1, 1.5, True, "1"])
def test_drop_that_is_no_number_of_interactions_is_refused(drop):
    config = default_config()
    config.data = {"dir": "x", "drop": drop}
    with pytest.raises(InputError, match=r"config\.data\.drop is"):
        validate(config)


def test_config_without_drop_drops_nothing():
    config = tiny()
    del config.data.drop
    validate(config)
    assert load_dataset(config).meta == load_dataset(tiny()).meta


# A study, end to end.

FILE = """
from ml_collections import ConfigDict
from conet_jax.config import (default_config)


def get_config(variant=""):
    config = default_config(variant)
    config.ials_trials = 0
    config.name = "tiny"
    config.layers = (8, 4)
    config.cross_layers = min(config.cross_layers, 1)
    config.epochs = 2
    config.ials_sweeps = 2
    config.batch_size = 64
    config.data.synthetic = ConfigDict(dict(
        num_users=60, num_target_items=130, num_source_items=120, target_interactions=420,
        source_interactions=500, seed=0,
    ))
    return config
"""
METHODS = ("mlp", "popularity", "ials", "ease")
LIMIT = {"max_items": 100}  # EASE is refused


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(FILE)
    return path


def load(path):
    spec = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


def tiny():
    scope = {}
    exec(FILE, scope)
    return scope["get_config"]("mlp")


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """The MLP is compiled once: only what is traced is drawn for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(search.SPACES, "mlp", {"learning_rate": search.Range(1e-3, 1e-2)})
        yield


def a_study(file, **fields):
    options = dict(given=LIMIT, workdir=Path("w"), seeds=2, trials=2)
    return table2.Study(str(file), load(file), **(options | fields))


def make(plan, methods=METHODS):
    return table2.run(plan, methods, [1], ["ials"])


@pytest.fixture(scope="module")
def finished(file, tmp_path_factory):
    """(folder, report) of a study that nothing disturbed."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, make(a_study(file))


@pytest.fixture
def copy(finished, tmp_path, monkeypatch):
    """The current folder: a copy of the finished study's."""
    shutil.copytree(finished[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def trials_in(folder):
    return [json.loads(path.read_text()) for path in (folder / "results").iterdir()]


@pytest.mark.slow
def test_study_leaves_trials_runs_and_tables(finished):
    folder, report = finished
    workdir = folder / "w"
    assert json.loads((workdir / "table2.json").read_text()) == report
    assert (workdir / "table2.md").read_text() == markdown.page(report)
    found = sorted(str(path.parent.relative_to(workdir)) for path in workdir.rglob("result.json"))
    seeds = ["seed_0", "seed_1"]
    expected = [f"{name}/{seed}" for name in ("ials", "ials/drop_1", "mlp") for seed in seeds]
    assert found == sorted([*expected, "popularity/seed_0"])
    for name, number in (("mlp", 2), ("ials", 2), ("ease", 2), ("popularity", 1)):
        rows = trials_in(workdir / name)
        assert len(rows) == number and not any("test" in row for row in rows)
    assert report["best_baseline"] == "mlp"
    assert len(report["commands"]["ials"]) == 4 and len(report["commands"]["popularity"]) == 1


@pytest.mark.slow
def test_study_reports_what_stands_in_the_runs(finished):
    folder, report = finished
    rows = {row["method"]: row for row in report["comparison"]}
    assert set(rows) == set(METHODS) and "max_items=100" in rows["ease"]["failed"]
    values, per_user = [], []
    for seed in range(2):
        run = folder / "w" / "mlp" / f"seed_{seed}"
        values.append(json.loads((run / "result.json").read_text())["test_warm"]["ndcg@10"])
        with np.load(run / "ranks.npz") as ranks:
            per_user.append(metrics.ndcg(ranks["test_warm_above"], ranks["test_warm_tied"], k=10))
    assert rows["mlp"]["warm"]["ndcg"]["mean"] == pytest.approx(np.mean(values))
    assert rows["mlp"]["warm"]["ndcg"]["std"] == pytest.approx(np.std(values, ddof=1))
    groups = report["cold"]["source"][:-1]
    users = [group["users"] for group in groups]
    means = [group["ndcg"]["mlp"] for group in groups]
    assert np.average(means, weights=users) == pytest.approx(np.mean(per_user))
    best = max(trials_in(folder / "w" / "mlp"), key=lambda trial: trial["valid_warm"]["ndcg@10"])
    stored = json.loads((folder / "w/mlp/seed_1/config.json").read_text())
    assert stored == {**best["config"], "seed": 1, "dataset_hash": best["dataset_hash"]}
    dropped = next(row for row in report["reduced"] if row["dropped"] == 1)
    assert dropped["method"] == "ials"
    data = drop_interactions(load_dataset(tiny()), 1)
    assert dropped["interactions"] == len(data.target.indices)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [1, 2, 4, 7])
def test_interrupted_study_goes_on_to_the_same_tables(file, finished, tmp_path, monkeypatch, calls):
    made = []

    def interrupted(function):
        def call(*args, **options):
            result = function(*args, **options)
            made.append(function)
            if len(made) == calls:
                raise KeyboardInterrupt
            return result

        return call

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(search, "evaluate", interrupted(search.evaluate))
        patch.setattr(population, "train", interrupted(population.train))
        patch.setattr(full_run, "fit", interrupted(fit))
        with pytest.raises(KeyboardInterrupt):
            make(a_study(file))
    assert make(a_study(file)) == finished[1]
    for name in ("table2.json", "table2.md"):
        assert (tmp_path / "w" / name).read_bytes() == (finished[0] / "w" / name).read_bytes()


@pytest.fixture
def nothing_is_run(monkeypatch):
    for module, name in ((search, "evaluate"), (population, "train"), (full_run, "fit")):
        monkeypatch.setattr(module, name, lambda *args, **options: pytest.fail("it ran again"))


@pytest.mark.slow
def test_finished_study_only_makes_its_tables(file, finished, copy, nothing_is_run):
    assert make(a_study(file)) == finished[1]
    assert table2.run(a_study(file), ["popularity"]) == finished[1]  # of all that are done
    fewer = table2.run(a_study(file, seeds=1), METHODS)
    assert fewer["comparison"][0]["method"] == "mlp"
    assert fewer["comparison"][0]["warm"]["ndcg"]["std"] is None
    more = table2.run(a_study(file, trials=3), ["popularity"])  # the others lack a trial
    assert [row["method"] for row in more["comparison"]] == ["popularity"]


@pytest.mark.slow
def test_scrambled_test_split_changes_no_choice(file, finished, copy, monkeypatch):
    def scrambled(config):
        data = whole(config)
        items = data.test.candidates[:, 0]
        candidates = np.roll(data.test.candidates, 1, axis=0)
        return data._replace(test=data.test._replace(items=items, candidates=candidates))

    whole = load_dataset
    monkeypatch.setattr(table2, "load_dataset", scrambled)
    found = table2.run(a_study(file, workdir=Path("other")), ("mlp", "popularity", "ials"))
    _, report = finished
    assert found["search"] == report["search"][:-1]  # ease is the last
    assert found["best_baseline"] == report["best_baseline"]
    assert found["comparison"] != report["comparison"]


@pytest.mark.slow
def test_checkpoints_may_go_once_there_is_a_result(file, finished, copy, nothing_is_run):
    assert (copy / "w" / "mlp" / "seed_0" / "checkpoints").is_dir()
    for _ in range(2):
        assert make(a_study(file, keep_checkpoints=False)) == finished[1]
        assert not list(copy.rglob("checkpoints"))


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"epochs": 3}, r"config\.epochs is 2 there and 3 here"),
        ({"patience": 2}, r"config\.patience is 5 there and 2 here"),
        ({"data.synthetic.seed": 1}, "of another search: .*the data's hash is"),
    ],
)
def test_workdir_of_another_study_is_refused(file, copy, nothing_is_run, fields, what):
    with pytest.raises(InputError, match=what):
        table2.run(a_study(file, given=LIMIT | fields), ["popularity"])


def test_trials_of_other_fields_are_refused(file, copy, nothing_is_run, monkeypatch):
    monkeypatch.setitem(search.SPACES, "ials", {"ials_alpha": search.Range(2.0, 3.0)})
    with pytest.raises(InputError, match=r"of another search: config\.layers is"):
        make(a_study(file))


def test_damaged_trials_are_named(file, copy):
    for path in (copy / "w" / "mlp" / "results").iterdir():
        path.write_text('{"overrides": ')
    with pytest.raises(InputError, match=r"mlp/results/\w+\.json cannot be read"):
        make(a_study(file))


def test_result_of_another_config_is_refused(file, copy, nothing_is_run):
    path = copy / "w" / "mlp" / "seed_1" / "result.json"
    result = json.loads(path.read_text())
    result["config"]["learning_rate"] = 0.5
    path.write_text(json.dumps(result))
    with pytest.raises(InputError, match=r"mlp/seed_1 holds .*config\.learning_rate is 0\.5"):
        make(a_study(file))


def test_run_that_fails_leaves_the_other_methods_their_tables(file, copy, monkeypatch):
    def fail(config, workdir, **options):
        raise InputError("the loss is not finite")

    monkeypatch.setattr(full_run, "fit", fail)
    (copy / "w" / "ials" / "seed_1" / "result.json").unlink()
    with pytest.raises(InputError, match="ials: the loss is not finite"):
        make(a_study(file))
    report = json.loads((copy / "w" / "table2.json").read_text())
    assert {row["method"] for row in report["comparison"]} == {"mlp", "popularity", "ease"}


@pytest.mark.slow
def test_printed_command_makes_the_same_run(finished, tmp_path):
    run = finished[0] / "w" / "ials" / "drop_1" / "seed_1"
    command = shlex.split((run / "command.txt").read_text())
    assert command[:2] == ["python", "launch/train.py"] and "--config.data.drop=1" in command
    assert command[-1] == "--workdir=w/ials/drop_1/seed_1"
    command = [sys.executable, *command[1:-1], f"--workdir={tmp_path / 'run'}"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    ours, theirs = (json.loads((at / "result.json").read_text()) for at in (tmp_path / "run", run))
    assert ours | {"seconds": 0} == theirs | {"seconds": 0}


def test_commands_quote_what_a_shell_would_read(file):
    command = a_study(file, given={"layers": (8, 4)}, workdir=Path("a b")).command(
        search.DEFAULT_METHODS
    )
    assert "'--config.layers=(8, 4)'" in command and "'--workdir=a b'" in command


def test_command_of_a_table_names_its_methods_where_they_are_not_all(file):
    plan = a_study(file)
    assert "--methods" not in plan.command(list(search.DEFAULT_METHODS))
    assert plan.command(["ease", "mlp"]).endswith(" --methods=ease,mlp")


def test_study_of_an_unknown_method_is_refused(file):
    for methods, drop_methods in ((["recipe_connet"], []), (["mlp"], ["published"])):
        with pytest.raises(
            InputError, match=r"unknown method '(recipe_connet'.*recipe_conet|publ)"
        ):
            table2.run(a_study(file), methods, [1], drop_methods)


# The command.


@pytest.mark.slow
def test_table2_prints_what_it_writes(file, tmp_path):
    done = launch(
        "table2", f"--config={file}", f"--workdir={tmp_path / 'w'}", "--methods=popularity"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith((tmp_path / "w" / "table2.md").read_text().strip())
    assert "popularity trial 1/1: warm valid ndcg@10" in done.stdout
    assert f"python launch/train.py --config={file}:popularity" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--drop=1,x"], ["--drop=1,x", "such as 1,2"]),
        (["--drop=0"], ["--drop=0"]),
        (["--seeds=0"], ["seeds"]),
        (["--methods=connet"], ["unknown method 'connet'", "did you mean conet?"]),
        (["--config=configs/demo.py:mlp"], ["variant 'mlp'", "--methods=mlp"]),
    ],
)
def test_bad_flag_is_one_line(arguments, fragments, tmp_path):
    given = [] if "--config" in arguments[0] else ["--config=configs/demo.py"]
    done = launch("table2", *given, f"--workdir={tmp_path}", *arguments)
    assert_one_line_error(done, *fragments)


def test_the_recommended_recipe_is_set_against_every_other_method():
    def runs(values):
        return tables.Runs([], np.array(values), [])

    found = tables.recommended(
        {
            "recipe": runs([0.4, 0.6, 0.9, 0.7]),
            "mlp": runs([0.3, 0.6, 0.5, 0.6]),
            "fm": runs([0] * 4),
        }
    )
    assert [row["method"] for row in found] == ["mlp", "fm"]
    assert found[0]["gain"] == pytest.approx(0.65 / 0.5 - 1) and found[1]["gain"] is None
    p = stats.ttest_rel([0.4, 0.6, 0.9, 0.7], [0.3, 0.6, 0.5, 0.6]).pvalue
    assert found[0]["against"]["mlp"]["p"] == pytest.approx(p)
    assert found[0]["against"]["mlp"]["difference"] == pytest.approx(0.15)
    assert tables.recommended({"mlp": runs([0.1, 0.2])}) == []
