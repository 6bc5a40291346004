"""Commands as users type them: exit status, one-line errors, what they print."""

import json
import re

import pytest
from helpers import DEMO, ROOT, assert_one_line_error, launch

from conet_jax.studies import curves


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "launch").glob("*.py")))
def test_help_says_of_every_flag_whether_it_has_a_default(name):
    done = launch(name, "--help")
    assert done.returncode == 0 and not done.stderr
    usage, _, listed = done.stdout.partition(f"launch/{name}.py:\n")
    assert f"python launch/{name}.py" in usage
    flags = [text for text in re.split(r"\n  (?=--)", "\n" + listed) if text.strip()]
    assert flags
    for text in flags:
        said = " ".join(text.split()).partition(": ")[2].replace("(default: 'None')", "")
        assert "default" in said or "required" in said, text


@pytest.mark.parametrize(
    ("name", "arguments", "fragments"),
    [
        ("train", ["--confg=x"], ["--confg", "did you mean --config?"]),
        ("train", [], ["--config is missing"]),
        ("train", ["--config=configs/nowhere.py"], ["configs/nowhere.py"]),
        ("train", [f"{DEMO}:conett"], ["unknown variant 'conett'", "published"]),
        ("train", [f"{DEMO}:ours"], ["unknown variant 'ours'", "it is called recipe now"]),
        ("train", [DEMO, "--config.targt_weight=0.5"], ["targt_weight", "target_weight"]),
        ("train", [DEMO, "--config.target_weight=1.5"], ["config.target_weight is 1.5", "[0, 1]"]),
        ("train", [DEMO, "--config.target_weight=half"], ["target_weight", "half"]),
        ("train", [DEMO, "--config.l1=-1"], ["config.l1 is -1", "[0, inf)"]),
        ("train", [DEMO, "--config.layers=(63,8)"], ["config.layers", "(63, 8)"]),
        ("train", [DEMO, "--config.cross_layers=4"], ["config.cross_layers is 4", "3 transitions"]),
        ("train", [DEMO, "--config.pairing=friends"], ["config.pairing", "same_user"]),
        ("train", ["--config=configs/movies_books.py", "--config.data.dir=nowhere"],
         ["no prepared data in nowhere", "python launch/prepare.py", "--out=nowhere"]),
        ("train", [DEMO, "stray"], ["stray"]),
        ("train", [DEMO, "--config.platform=tpu"], ["config.platform is 'tpu'"]),
        ("train", [DEMO, "--config.seed=99999999999"], ["config.seed is 99999999999"]),
        ("train", [DEMO, "--config.data.dir=x"], ["config.data.dir is 'x'", "configs/default.py"]),
        ("train", ["--config=README.md"], ["config file cannot be used"]),
        ("evaluate", [], ["workdir"]),
        ("evaluate", ["--workdir=nowhere"], ["nowhere", "launch/train.py"]),
        ("evaluate", ["--workdir=nowhere", "--split=train"], ["split", "test"]),
        ("demo", ["--seed=-1"], ["seed"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_two(name, arguments, fragments, tmp_path):
    done = launch(name, *arguments)
    assert_one_line_error(done, *fragments)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "demo"
    done = launch("train", DEMO, f"--workdir={workdir}", "--config.epochs=2")
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_train_prints_plain_lines_without_a_terminal(run):
    _, printed = run
    assert "epoch   1  train loss: target" in printed and "\x1b" not in printed


def test_train_draws_its_curves_by_epoch(run):
    workdir, _ = run
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    shown = curves.panels(rows)
    losses, validation, size, zeros = shown.values()
    for domain in ("target", "source"):
        assert losses[domain] == [row["train_loss"][domain] for row in rows]
    assert validation["warm"] == [row["valid_warm"]["ndcg@10"] for row in rows]
    assert size["layer 1"] == [row["diagnostics"]["h_mean_abs/layer_1"] for row in rows]
    assert set(zeros) == {"layer 1", "layer 2", "layer 3"}
    picture = (workdir / "curves.svg").read_text()
    assert picture.count('<g id="axes_') == 4
    assert curves.draw(workdir).read_text() == picture  # the same numbers, the same file


def test_a_run_of_one_epoch_has_no_curves(run, tmp_path):
    workdir, _ = run
    first, _ = (workdir / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text(first + "\n")
    assert curves.draw(tmp_path) is None and not (tmp_path / "curves.svg").exists()


@pytest.mark.parametrize("split", ["test", "valid"])
def test_evaluate_reproduces_the_result(run, split):
    workdir, _ = run
    done = launch("evaluate", f"--workdir={workdir}", f"--split={split}")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    result = json.loads((workdir / "result.json").read_text())
    for part in (split, f"{split}_warm"):
        assert printed[part] == result[part]


def test_full_ranking_is_harder_than_ninety_nine_candidates(run):
    workdir, _ = run
    done = launch("evaluate", f"--workdir={workdir}", "--full_ranking")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    result = json.loads((workdir / "result.json").read_text())
    full, few = printed["test_warm"], result["test_warm"]
    assert 0 < full["ndcg@10"] < few["ndcg@10"]
    assert full["auc"] == pytest.approx(few["auc"], abs=0.03)


def test_workdir_of_another_config_is_refused(run):
    workdir, _ = run
    done = launch("train", DEMO, f"--workdir={workdir}", "--config.seed=1", "--config.epochs=2")
    assert_one_line_error(done, "config.seed is 0 there and 1 here")


@pytest.mark.parametrize(
    "body", ["return 3", "raise RuntimeError('no')", "return ConfigDict({'nam': 'x'})"]
)
def test_config_file_that_cannot_be_used_is_one_line(body, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        f"from ml_collections import ConfigDict\ndef get_config(variant=''):\n    {body}\n"
    )
    assert_one_line_error(launch("train", f"--config={path}"))


def test_altered_config_of_a_run_is_an_error(run, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert_one_line_error(launch("evaluate", f"--workdir={tmp_path}"), "config.json")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_demo_puts_the_recipe_under_the_oracle_and_over_its_linear_start(tmp_path, seed):
    done = launch("demo", f"--workdir={tmp_path / 'demo'}", f"--seed={seed}")
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("test split") :].splitlines()[2:]
    ndcg = {line.partition(":")[0]: float(line.split()[-2]) for line in table}
    assert ndcg["oracle"] > ndcg["recipe"] > ndcg["ials_joined"]
    assert ndcg["lasso"] > ndcg["popularity"]
