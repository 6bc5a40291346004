"""The package in Python and in notebooks: fit, load, recommend, and the notebook of docs/."""

import json
import os
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from helpers import ROOT

import conet_jax
from conet_jax.data import store
from conet_jax.errors import InputError
from conet_jax.serve import fitted, recommend

FIELDS = {"epochs": 2, "layers": (8, 4), "ials_trials": 3, "quiet": True}


def table(kind, seed):
    """Whose ids of users are numbers."""
    rng = np.random.default_rng(seed)
    rows = [
        (user, f"{kind}{item:02}", int(rng.integers(3, 6)))
        for user in range(40)
        for item in rng.choice(30, 8, replace=False)
    ]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "rating"], orient="row")


@pytest.fixture(scope="module")
def data():
    return conet_jax.prepare(target=table("b", 0), source=table("m", 1), candidates=21)


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    return conet_jax.fit(data, tmp_path_factory.mktemp("run") / "ials", "ials_joined", **FIELDS)


def test_the_package_has_its_functions_by_name_and_loads_them_late():
    assert conet_jax.fit is fitted.fit and conet_jax.load is fitted.load
    assert {"prepare", "fit", "load"} <= set(dir(conet_jax))
    code = "import sys, conet_jax; assert not {'jax', 'polars'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_fitted_model_recommends_as_the_parts_do(data, model, tmp_path):
    parts = recommend.load(model.workdir, data=data)
    want = recommend.recommend(parts, recommend.find_users(parts, ["3", "7"]), k=4)
    assert model.recommend([3, "7"], k=4).equals(want)
    assert model.recommend(np.int64(3), k=2).equals(want.filter(pl.col("user") == "3").head(2))
    assert set(model.recommend(k=1)["user"]) == set(data.user_ids)
    some = model.recommend("3", k=9, items=["b01", "b02", "nothing"], include_seen=True)
    assert set(some["item"]) == {"b01", "b02"}
    assert 0 <= model.result["test"]["ndcg@10"] <= 1
    assert str(model) == f"Fitted({str(model.workdir)!r}, {data.num_users} users)"


def test_users_who_are_not_in_the_data_are_known_by_what_they_have(model):
    found = model.recommend(["new"], k=3, source={"new": ["m01", "m02", "unknown"]})
    assert found["method"].to_list() == ["source items"] * 3
    both = model.recommend("new", source={"new": ["m01"]}, target={"new": ["b05"]})
    assert both["method"].unique().to_list() == ["items"] and "b05" not in both["item"].to_list()
    with pytest.raises(InputError, match="user 'new' is in neither domain"):
        model.recommend("new", source={"new": ["unknown"]})
    assert model.recommend("new", fallback=True)["method"][0] == "popularity"
    everyone = model.recommend(k=1, source={"new": ["m01"], "other": ["unknown"]})
    assert "new" in everyone["user"].to_list() and "other" not in everyone["user"].to_list()


def test_data_in_a_folder_are_found_again_and_those_in_memory_are_asked_for(data, model, tmp_path):
    store.save(data, tmp_path / "data")
    other = conet_jax.fit(tmp_path / "data", tmp_path / "run", "popularity", **FIELDS)
    again = conet_jax.load(tmp_path / "run")
    assert again.recommend().equals(other.recommend()) and again.result == other.result
    assert (
        conet_jax.load(model.workdir, data=tmp_path / "data")
        .recommend("3")
        .equals(model.recommend("3"))
    )
    with pytest.raises(InputError, match="were in memory, in no folder: give them again by data="):
        conet_jax.load(model.workdir)
    others = conet_jax.prepare(target=table("b", 5), source=table("m", 1), candidates=21)
    with pytest.raises(InputError, match="the data given are not those of"):
        conet_jax.load(model.workdir, data=others)


def test_the_same_call_again_gives_the_same_run_and_another_is_refused(data, model):
    same = conet_jax.fit(data, model.workdir, "ials_joined", **FIELDS)
    assert {**same.result, "seconds": 0} == {**model.result, "seconds": 0}
    with pytest.raises(InputError, match="holds a run of another config"):
        conet_jax.fit(data, model.workdir, "ials_joined", **FIELDS | {"layers": (12, 4)})


def test_fields_that_are_unknown_or_do_not_fit_are_refused(data, tmp_path):
    for fields, message in (
        ({"epoch": 3}, "unknown config field config.epoch; did you mean config.epochs"),
        ({"epochs": "three"}, "config.epochs is 'three': expected a whole number"),
        ({"epochs": 0}, "config.epochs is 0: expected a whole number"),
        ({"variant": "recip"}, "unknown variant 'recip'"),
    ):
        with pytest.raises(InputError, match=message):
            conet_jax.fit(data, tmp_path / "run", **fields)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="no prepared data here"):
        conet_jax.fit(tmp_path, tmp_path / "run")


_IN_A_LOOP = """
import asyncio, importlib, sys, threading
sys.path.insert(0, {tests!r})
import conet_jax
from test_python import FIELDS, table


async def cells():
    data = conet_jax.prepare(target=table("b", 0), source=table("m", 1), candidates=21)
    first = conet_jax.fit(data, "one", "ials_joined", **FIELDS)
    lists = first.recommend(k=2)
    # A second call in the process, and in a thread that is not the main one.
    second = conet_jax.fit(data, "two", "ials_joined", **FIELDS)
    third = await asyncio.to_thread(conet_jax.fit, data, "three", "ials_joined", **FIELDS)
    assert second.recommend(k=2).equals(lists) and third.recommend(k=2).equals(lists)
    for name in ("data.types", "data.prepare", "run.fit", "run.workdir", "serve.fitted"):
        importlib.reload(sys.modules["conet_jax." + name])
    importlib.reload(conet_jax)
    assert conet_jax.load("one", data=data).recommend(k=2).equals(lists)
    new = conet_jax.prepare(target=table("b", 0), source=table("m", 1), candidates=21)
    assert conet_jax.fit(new, "four", "ials_joined", **FIELDS).recommend(k=2).equals(lists)


asyncio.run(cells())
assert threading.active_count() < 200
print("done")
"""


def test_all_works_under_a_running_loop_again_in_a_thread_and_after_a_reload(tmp_path):
    code = _IN_A_LOOP.format(tests=str(ROOT / "tests"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n" and "Traceback" not in done.stderr, done.stderr


def test_the_notebook_is_saved_without_outputs():
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)


# The long name of a category: a warning of nbclient's own.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_runs_in_a_kernel(tmp_path):
    """A minute; CI is to run it."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    try:
        client.execute()  # a cell that raises is an error
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    texts = [out.data["text/plain"] for out in outputs if out.output_type == "execute_result"]
    errors = [out.text for out in outputs if out.output_type == "stream"]
    assert not [text for text in errors if "rror" in text or "arning" in text], errors
    assert "'item': 'book'" in texts[1] and "'rating': 'stars'" in texts[1]
    scores = dict(pair.split(": ") for pair in texts[3].strip("{}").split(", "))
    assert float(scores["'recipe'"]) > 1.2 * float(scores["'popularity'"])
    assert "user 310" in texts[5] and "source items" in texts[5]
