"""``conet NAME`` and ``python -m conet_jax NAME`` are launch/NAME.py, from any folder."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT, SMALL, assert_one_line_error, launch

import conet_jax
from conet_jax import console


def conet(*words, cwd, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-m", "conet_jax", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=300)


def test_version_and_list_of_all_launchers(tmp_path):
    assert conet("--version", cwd=tmp_path).stdout == f"conet_jax {conet_jax.__version__}\n"
    listed = conet(cwd=tmp_path).stdout
    names = [line.split()[0] for line in listed.splitlines() if line.startswith("  ")]
    assert names == sorted(path.stem for path in (ROOT / "launch").glob("*.py"))
    assert conet("--help", cwd=tmp_path).stdout == listed


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean train?"]),
        (["x"], ["unknown command 'x'", "recommend"]),
        (["évaluer"], [r"unknown command '\xe9valuer'"]),
        (["train"], ["--config is missing"]),
        (["train", "--config=amazon"], ["conet prepare --download=amazon --out=data/amazon"]),
        (["train", "--config", "configs/amazon.py"], ["no prepared data in data/amazon"]),
        (["train", "--config=configs/amazone.py"], ["configs/amazone.py", "cannot be read"]),
        (["evaluate", "--workdir=none"], ["conet train --config=configs/NAME.py --workdir=none"]),
    ],
)
def test_bad_command_is_one_line_that_speaks_of_conet(words, fragments, tmp_path):
    done = conet(*words, cwd=tmp_path)
    assert_one_line_error(done, *fragments)
    assert "launch/" not in done.stderr


def test_help_of_a_command_is_that_of_its_launcher(tmp_path):
    said, of_launcher = conet("recommend", "--help", cwd=tmp_path), launch("recommend", "--help")
    assert said.returncode == 0 and not said.stderr
    assert "conet recommend --workdir=DIR (--user=ID" in said.stdout
    flags = [done.stdout.partition("\nflags:\n")[2].splitlines() for done in (said, of_launcher)]
    assert flags[0][1] == "conet recommend:" and len(flags[0]) > 30
    assert [x for x in flags[0] if " --" in x] == [x for x in flags[1] if " --" in x]


def test_config_in_the_working_folder_goes_before_the_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = f"{ROOT / 'configs' / 'demo.py'}"
    for name in ("demo", "demo.py", "configs/demo.py", "./configs/demo.py"):
        assert console.packaged_config(name) == packaged
        assert console.packaged_config(f"{name}:mlp") == f"{packaged}:mlp"
        assert console.with_packaged_configs(["--config", name]) == ["--config", packaged]
    for name in ("nowhere", "other/demo.py", "/configs/demo.py", ""):
        assert console.packaged_config(name) == name
    typed = ["--k=1", "--config.seed=1", "--", "--config=demo"]
    assert console.with_packaged_configs(typed) == typed
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.py").write_text("")
    assert console.packaged_config("configs/demo.py") == "configs/demo.py"


@pytest.mark.slow
def test_launchers_are_found_by_sweep_and_its_processes(tmp_path):
    """The processes of --jobs start from the same command."""
    sizes = [f"--config.data.synthetic.{name}={value}" for name, value in SMALL.items()]
    done = conet(
        *("sweep", "--config=demo:popularity", "--grid=config.patience=1,2", "--jobs=2"),
        *("--workdir=sweep", *sizes),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "conet train --config=configs/demo.py:popularity" in (
        tmp_path / "sweep" / "sweep.md"
    ).read_text(encoding="utf-8")
