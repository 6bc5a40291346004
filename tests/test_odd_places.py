"""Ten commands of the pages, typed with stdout closed, under ASCII, elsewhere, HOME read-only."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from test_docs import README, commands

pytestmark = pytest.mark.slow
_SHORT = {"train": "--config.epochs=1", "sweep": "--config.epochs=1"}


def typed():
    """Words of ten commands, the README's first, each from its launcher on; training is short."""
    for page in (README, ROOT / "docs" / "serving.md"):
        for words in commands(page):
            at = next((n for n, word in enumerate(words) if word.startswith("launch/")), None)
            if at is not None:
                name = re.fullmatch(r"launch/(\w+)\.py", words[at])[1]
                yield name, [*words[at + 1 :], *filter(None, [_SHORT.get(name)])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Raw files of items whose ids are not ASCII, and nothing of a clone."""
    folder, rng = tmp_path_factory.mktemp("elsewhere"), np.random.default_rng(0)
    for name, items in (("books.csv", 130), ("movies.csv", 110)):
        rows = [f"{user},książka {i}" for user in range(200) for i in rng.permutation(items)[:9]]
        rows += [f"1003,książka {i}" for i in range(9) if name == "movies.csv"]
        text = "\n".join(["user_id,item_id", *rows]) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(name, flags, folder, redirected):
    kept = {k: x for k, x in os.environ.items() if not k.startswith(("JAX_COMP", "XDG_", "LC_"))}
    env = kept | {"HOME": "/dev/null", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    script = f'"$@" {redirected}; exit "${{PIPESTATUS[0]}}"'
    words = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *flags]
    return subprocess.run(
        ["bash", "-c", script, "bash", *words], capture_output=True, text=True, env=env, cwd=folder
    )


def test_ten_commands_of_the_pages_leave_no_traceback(folder):
    ten = list(typed())[:10]
    assert len(ten) == 10 and {name for name, _ in ten} > {"demo", "prepare", "train", "recommend"}
    for name, flags in ten:
        done = run(name, flags, folder, ">&-")
        assert done.returncode == 0 and "Traceback" not in done.stderr, (name, flags, done.stderr)
        assert "compilation cache" not in done.stderr, done.stderr
        if name not in ("prepare", "recommend"):
            continue  # too long to be done again
        done = run(name, flags, folder, "")
        assert done.returncode == 0, (name, flags, done.stderr)
        assert done.stdout.isascii() and done.stderr.isascii()
        if name == "recommend" and not any(flag.startswith("--out") for flag in flags):
            assert "ksi\\u0105\\u017cka" in done.stdout
        done = run(name, flags, folder, "| head -1")
        assert done.returncode in (0, 141) and not re.search("Traceback|Error", done.stderr)
