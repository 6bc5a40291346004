"""Commands of README.md and docs/*.md as they stand there, in a folder as a clone is.

Above every block stands what is to be done with it: ``<!-- run -->``, ``<!-- run: slow -->`` or
``<!-- not run: why -->``. Blocks of a page run from top to bottom, the slow ones of README.md
before those of every other page: it prepares the data and trains the run that they name.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

import conet_jax
from conet_jax.config import FIELDS
from conet_jax.variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
TEXTS = (*PAGES, ROOT / "CONTRIBUTING.md")
_BLOCK = re.compile(r"(?:<!-- ([^>\n]+) -->\n)?```(sh|python)\n(.*?)```", re.DOTALL)
_PATH = r"(?:launch|configs|examples|benchmarks|tests|conet_jax|\.ci)/[\w./]+\.(?:py|sh)"
_EXAMPLE = re.compile("NAME|FILE|mf_tower|my_books")  # in paths that need not exist

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
by_text = pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)


def blocks(page):
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def pages_with(mark):
    found = [page for page in PAGES if any(block[0] == mark for block in blocks(page))]
    return pytest.mark.parametrize("page", found, ids=lambda page: page.name)


def commands(page):
    """Words of each command of the page's shell blocks."""
    for _, language, code in blocks(page):
        for line in code.replace("\\\n", " ").splitlines() if language == "sh" else []:
            yield from (shlex.split(command) for command in line.split("&&"))


def test_readme_has_at_most_250_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


def test_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {conet_jax.__version__}\n" in text


@by_page
def test_every_block_says_whether_it_is_run(page):
    for mark, language, text in blocks(page):
        assert mark in ("run", "run: slow") or mark.startswith("not run: "), (language, text)


@by_text
def test_paths_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", text)
    named = [page.parent / link for link in links]
    named += [ROOT / path for path in re.findall(_PATH, text) if not _EXAMPLE.search(path)]
    assert not [path for path in named if not path.exists()]


@by_text
def test_config_fields_and_variants_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    fields = set(re.findall(r"(?<!\w)config\.(\w+)\b(?!\()", text)) - {
        "data",
        "json",
        "py",
        "FIELD",
    }
    assert not fields - FIELDS.keys()
    variants = set(re.findall(r"configs/\w+\.py:(\w+)", text)) | {
        method
        for words in commands(page)
        for word in words
        if word.startswith("--methods=")
        for method in word.partition("=")[2].split(",")
    }
    assert not variants - VARIANTS.keys() - {"mf_tower"}


@lru_cache
def flags_of(script):
    text = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    return {"help", *re.findall(r"^ +--(?:\[no\])?(\w+):", text.stdout, re.MULTILINE)}


@by_page
def test_flags_of_every_command_exist(page):
    """Those of blocks that are not run, too."""
    for words in commands(page):
        script = next((word for word in words if word.startswith("launch/")), None)
        if script is not None:
            flags = {
                match[1] for word in words if (match := re.match(r"--(?!config\.)(\w+)", word))
            }
            assert not flags - flags_of(script), words


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Launchers, configs and examples, and two raw files as the pages suppose them."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("launch", "configs", "examples", "benchmarks", "tests", "conet_jax"):
        (folder / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    taste = rng.normal(size=(400, 2))
    for name, items, each in (("books.csv", 120, 8), ("movies.csv", 90, 10)):
        lines = ["user_id,item_id,timestamp"]
        places = rng.normal(size=(items, 2))
        for user in range(400):
            if name == "books.csv" and user == 399:
                continue  # user 1003 is in the source alone
            liked = np.argsort(-(places @ taste[user]) + 1.5 * rng.normal(size=items))[:each]
            # Ids that the pages ask for: user 1003, items 2320 and 2657.
            number = 1003 if user == 399 else user
            lines += [f"{number},{ {0: 2320, 1: 2657}.get(i, i) },{n}" for n, i in enumerate(liked)]
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def start(command, folder, more=None):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path} | (more or {})
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"


def run(page, clone, marks):
    for mark, language, code in blocks(page):
        if mark not in marks:
            continue
        # The environment is this one: nothing is installed.
        code = "".join(f"{x}\n" for x in code.splitlines() if not x.startswith("pip install"))
        command = ["bash", "-euc", code] if language == "sh" else [sys.executable, "-c", code]
        start(command, clone)


@pages_with("run")
def test_quick_blocks_run_as_they_stand(page, clone):
    run(page, clone, ("run",))
    if page.name == "serving.md":
        split, back = clone / "data" / "split", clone / "data" / "back"
        for path in split.glob("*.npy"):
            assert path.read_bytes() == (back / path.name).read_bytes()
        hashes = {
            json.loads((folder / "dataset.json").read_text())["hash"] for folder in (split, back)
        }
        assert len(hashes) == 1


@pytest.fixture(scope="module")
def newcomer(clone):
    """The clone once README.md has been followed."""
    run(README, clone, ("run: slow",))
    return clone


@pytest.mark.slow
@pages_with("run: slow")
def test_slow_blocks_run_as_they_stand(page, newcomer):
    if page == README:
        assert (newcomer / "runs" / "mine-recipe" / "result.json").exists()
    else:
        run(page, newcomer, ("run: slow",))


@pytest.mark.slow
def test_model_metric_and_data_set_are_added_as_contributing_says(clone, tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in ("conet_jax", "configs", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    files = re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL)
    assert len(files) == 2
    for path, code in files:
        (tmp_path / path).write_text(code)
    for path, after, line in (
        ("models/__init__.py", "NAMES = (\n", r'    "mf_tower",\n'),
        ("variants.py", "REFERENCES = {\n", r'    "mf_tower": .*\n'),
        ("metrics.py", "METRICS = (\n", r"    Metric\(.*\n"),
    ):
        (line,) = re.findall(rf"^{line}", text, re.MULTILINE)
        source = (tmp_path / "conet_jax" / path).read_text()
        assert source.count(after) == 1
        (tmp_path / "conet_jax" / path).write_text(source.replace(after, after + line))
    code = f"""
        ln -s {clone}/*.csv .
        python launch/prepare.py --target=books.csv --source=movies.csv --out=data/my_books
        python launch/train.py --config=configs/my_books.py:mf_tower --config.epochs=1
        python launch/recommend.py --workdir=runs/my_books-mf_tower --user=0"""
    start(["bash", "-euc", code], tmp_path, {"PYTHONPATH": str(tmp_path)})
    result = json.loads((tmp_path / "runs" / "my_books-mf_tower" / "result.json").read_text())
    assert result["config"]["model"] == "mf_tower" and 0 < result["test_warm"]["hit_ratio@3"] < 1
