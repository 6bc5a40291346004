"""The README's commands as they stand there, from top to bottom, in a folder as a clone is.

Above every block stands what is to be done with it: ``<!-- run -->``, ``<!-- run: slow -->`` or
``<!-- not run: why -->``.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

_BLOCK = re.compile(r"(?:<!-- ([^>\n]+) -->\n)?```(sh|python)\n(.*?)```", re.DOTALL)


def blocks():
    return _BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def test_every_block_says_whether_it_is_run():
    for mark, language, text in blocks():
        assert mark in ("run", "run: slow") or mark.startswith("not run: "), (language, text)


def test_paths_that_blocks_and_links_name_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\((?!http|#)([^)]+)\)", text)
    for _, language, code in blocks():
        if language == "sh":
            named += re.findall(r"(?:launch|configs|examples|tests)/[\w./]+\.py", code)
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_flags_of_every_command_exist():
    """Those of blocks that are not run, too."""
    for _, language, code in blocks():
        for line in code.replace("\\\n", " ").splitlines() if language == "sh" else []:
            for command in line.split("&&"):
                words = shlex.split(command)
                script = next((word for word in words if word.startswith("launch/")), None)
                if script is None:
                    continue
                source = (ROOT / script).read_text(encoding="utf-8")
                for word in words:
                    flag = re.match(r"--(?!config\.)(\w+)", word)
                    assert flag is None or f'"{flag[1]}"' in source, command


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Launchers, configs and examples, and two raw files as the README supposes them."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("launch", "configs", "examples", "tests", "conet_jax"):
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
            # Ids that the README asks for: user 1003, items 2320 and 2657.
            number = 1003 if user == 399 else user
            lines += [f"{number},{ {0: 2320, 1: 2657}.get(i, i) },{n}" for n, i in enumerate(liked)]
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def run_all(clone, marks):
    for mark, language, code in blocks():
        if mark not in marks:
            continue
        # The environment is this one: nothing is installed.
        code = "".join(f"{x}\n" for x in code.splitlines() if not x.startswith("pip install"))
        command = ["bash", "-euc", code] if language == "sh" else [sys.executable, "-c", code]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=clone, env=os.environ | {"PATH": path}
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_quick_blocks_run_as_they_stand(clone):
    run_all(clone, ("run",))
    for path in (clone / "data" / "split").iterdir():
        assert path.read_bytes() == (clone / "data" / "back" / path.name).read_bytes()


@pytest.mark.slow
def test_a_newcomer_s_path_runs_as_it_stands(clone):
    run_all(clone, ("run: slow",))
    runs = clone / "runs"
    assert (runs / "lists.parquet").exists() and (runs / "exported" / "score.stablehlo").exists()
