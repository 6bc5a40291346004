"""The wheel in a fresh environment without the clone: own data from files to recommendations.

``.ci/run`` makes the wheel and names it by ``CONET_WHEEL``.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
WHEEL = os.environ.get("CONET_WHEEL")

pytestmark = pytest.mark.skipif(not WHEEL, reason="CONET_WHEEL names no wheel; .ci/run makes one")


@pytest.fixture(scope="module")
def conet(tmp_path_factory):
    """Runs ``conet`` in a folder with two raw files."""
    venv, folder = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("elsewhere")
    for command in (
        [sys.executable, "-m", "venv", "--without-pip", venv],
        [sys.executable, "-m", "pip", f"--python={venv}", "install", "--no-deps", "-q", WHEEL],
    ):
        subprocess.run([*map(str, command)], check=True)
    # The dependencies as they are here; the package that is installed here does not come with them.
    (packages,) = venv.glob("lib/python3.*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    rng = np.random.default_rng(0)
    for name, items in (("books.csv", 130), ("movies.csv", 90)):
        rows = [f"u{user},i{item}" for user in range(80) for item in rng.permutation(items)[:8]]
        (folder / name).write_text("\n".join(["user_id,item_id", *rows]) + "\n")

    def run(*words, script=None):
        env = {k: x for k, x in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        env["PATH"] = f"{venv / 'bin'}{os.pathsep}{env['PATH']}"
        command = [str(venv / "bin" / "python"), "-c", script] if script else ["conet", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    run.folder, run.venv = folder, venv
    return run


def test_package_is_that_of_the_wheel_and_brings_launchers_and_configs(conet):
    script = "import conet_jax; from conet_jax import console; print(console.home())"
    home = Path(conet(script=script).strip())
    assert home.is_relative_to(conet.venv.resolve())
    for folder in ("launch", "configs"):
        ours = {path.name: path.read_bytes() for path in (ROOT / folder).glob("*.py")}
        ours.pop("benchmark.py", None)  # its suites are the clone's
        assert ours == {path.name: path.read_bytes() for path in (home / folder).glob("*.py")}
    assert conet("--version").startswith("conet_jax ")


@pytest.mark.parametrize(
    "name", sorted({path.stem for path in (ROOT / "launch").glob("*.py")} - {"benchmark"})
)
def test_every_launcher_starts_from_the_wheel(conet, name):
    assert f"\nconet {name}:\n" in conet(name, "--help")


def test_own_data_from_files_to_recommendations(conet):
    conet("prepare", "--target=books.csv", "--source=movies.csv", "--out=data/mine")
    train = ("train", "--config=configs/default.py:mlp", "--data=data/mine")
    printed = conet(*train, "--config.epochs=2")
    assert "epoch   2" in printed
    run = "--workdir=runs/mine-mlp"
    result = json.loads((conet.folder / "runs" / "mine-mlp" / "result.json").read_text())
    assert json.loads(conet("evaluate", run))["test"] == result["test"]
    listed = conet("recommend", run, "--user=u3", "--k=5")
    assert "u3" in listed and listed.count("i") >= 5
    conet("train", "--config=demo:popularity", "--config.epochs=1")
