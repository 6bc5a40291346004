"""A run or its data moved, or another working folder: the data are found, or the error says how."""

import contextlib
import json
import os
import shutil

import pytest
from helpers import assert_one_line_error, launch, tiny

from conet_jax.errors import InputError
from conet_jax.run import whereabouts
from conet_jax.run.fit import fit
from conet_jax.run.workdir import restore
from conet_jax.serve import recommend

RUN = "runs/mine-popularity"
_PREPARE = ["--target=raw/books", "--source", "raw/movies", "--min_user_items=2"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with raw files, prepared data, and a run of one epoch, all by commands in it."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "raw").mkdir()
    for name, items in (("books", 130), ("movies", 110)):
        rows = [f"u{u},i{(7 * u + 11 * i) % items}" for u in range(40) for i in range(9)]
        (folder / "raw" / name).write_text("\n".join(["user,item", *rows]) + "\n")
    done = launch("prepare", *_PREPARE, "--out", "data/mine", cwd=folder)
    assert done.returncode == 0, done.stderr
    config = tiny("popularity", epochs=1)
    config.data.dir = "data/mine"
    with contextlib.chdir(folder):
        fit(config, RUN, quiet=True)
    return folder


@pytest.fixture
def moved(project, tmp_path):
    """A copy of it elsewhere; the original is not where it was."""
    gone = project.with_name("gone")
    shutil.copytree(project, tmp_path / "new")
    project.rename(gone)
    yield tmp_path / "new"
    gone.rename(project)


def test_command_that_made_the_data_is_kept_with_them_and_with_the_run(project):
    meta = json.loads((project / "data" / "mine" / "dataset.json").read_text())
    kept = "python launch/prepare.py --target=raw/books --source raw/movies --min_user_items=2"
    assert meta["prepared_by"] == kept
    stored = json.loads((project / RUN / "config.json").read_text())
    assert stored["dataset_place"] == {
        "folder": str(project / "data" / "mine"),
        "from_run": "../../data/mine",
        "prepared_by": kept,
    }


def test_training_goes_on_from_another_working_folder(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny("popularity", epochs=2)
    config.data.dir = "data/mine"
    fit(config, project / RUN, quiet=True)
    stored = json.loads((project / RUN / "config.json").read_text())
    assert stored["dataset_place"]["folder"] == str(project / "data" / "mine")
    with pytest.raises(InputError, match="no prepared data in data/mine"):
        fit(config, "run", quiet=True)


@pytest.mark.parametrize("place", ["data/mine", "runs/mine", f"{RUN}/mine"])
def test_data_that_have_moved_with_the_run_or_next_to_it(moved, place, monkeypatch):
    if place != "data/mine":
        (moved / "data" / "mine").rename(moved / place)
    for folder in (moved, moved.parent):
        monkeypatch.chdir(folder)
        path = os.path.relpath(moved / RUN)
        assert restore(path)[0].config.data.dir.endswith(place)


def test_of_several_folders_the_one_with_the_hash_of_the_run_is_taken(project, tmp_path):
    """The place where the data were has other data now."""
    moved = shutil.copytree(project, tmp_path / "new")
    path = project / "data" / "mine" / "dataset.json"
    kept = path.read_text()
    path.write_text(kept.replace('"hash": "', '"hash": "0'))
    try:
        assert restore(moved / RUN)[0].config.data.dir == str(moved / "data" / "mine")
    finally:
        path.write_text(kept)


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate"],
        pytest.param(["recommend", "--user=u3"], marks=pytest.mark.slow),
        pytest.param(["export", "--out=exported"], marks=pytest.mark.slow),
    ],
    ids=lambda command: command[0],
)
def test_data_that_are_gone_are_named_with_the_command_that_made_them(moved, project, command):
    (moved / "data" / "mine").rename(moved / "elsewhere")
    command = (*command, f"--workdir={RUN}")
    done = launch(*command, cwd=moved)
    assert_one_line_error(done, f"not in {project}/data/mine, nor next to the run", "--data=DIR")
    assert f"--min_user_items=2 --out={project}/data/mine" in done.stderr
    done = launch(*command, "--data=elsewhere", cwd=moved)
    assert done.returncode == 0, done.stderr


def test_folder_that_the_user_names_is_the_only_one(moved):
    shutil.copytree(moved / "data" / "mine", moved / "elsewhere")
    assert recommend.load(moved / RUN, data=moved / "elsewhere").dataset.num_users == 40
    with pytest.raises(InputError, match="are not in nowhere: name .* --out=nowhere$"):
        recommend.load(moved / RUN, data="nowhere")


def test_run_of_before_the_place_was_kept(project, tmp_path, monkeypatch):
    moved = shutil.copytree(project, tmp_path / "new")
    path = moved / RUN / "config.json"
    stored = json.loads(path.read_text())
    del stored["dataset_place"]
    path.write_text(json.dumps(stored))
    monkeypatch.chdir(moved)
    assert restore(RUN)[0].config.data.dir == "data/mine"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the data of new/.* are not in data/mine"):
        restore(f"new/{RUN}")
    assert restore(f"new/{RUN}", data="new/data/mine")


def test_place_of_data_that_are_in_no_folder():
    config = {"data": {"dir": "", "drop": 0}}
    with pytest.raises(InputError, match="the data of run were in memory, in no folder"):
        whereabouts.find("run", config, {}, "0")
