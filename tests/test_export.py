"""Exports, read again: in a process without conet_jax, and by way of RecBole's files."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from helpers import ROOT, as_if_trained, assert_one_line_error, launch

from conet_jax.config import default_config
from conet_jax.data import recbole, store, synthetic
from conet_jax.data.types import content_hash
from conet_jax.errors import InputError
from conet_jax.run.experiment import make_experiment
from conet_jax.run.start import initial_state
from conet_jax.run.workdir import restore
from conet_jax.serve import export


@pytest.fixture(scope="module")
def data():
    made = synthetic.dataset(
        num_users=40,
        num_target_items=120,
        num_source_items=60,
        target_interactions=250,
        source_interactions=300,
        seed=0,
    )[0]
    # Ids as they are found: leading zeros, spaces, quotes, other scripts; not in order.
    ids = [f'0{n} "é日' for n in range(40, 0, -1)]
    made = made._replace(user_ids=np.array(ids, object))
    return made._replace(meta=made.meta | {"hash": content_hash(made)})


def experiment_of(data, variant):
    config = default_config(variant)
    config.ials_trials = 0
    config.layers = (8, 6, 4)
    config.cross_layers = min(config.cross_layers, 2)
    return make_experiment(config, data)


def parameters(experiment):
    if experiment.sweep is not None:
        return experiment.sweep(initial_state(experiment))
    return as_if_trained(experiment.params(initial_state(experiment)))


_READER = """
import json, sys
import jax, numpy as np, polars as pl
from pathlib import Path
from safetensors.numpy import load_file

folder = Path(sys.argv[1])
tensors = load_file(folder / "projected.safetensors")
score = jax.export.deserialize((folder / "score.stablehlo").read_bytes())
out = []
for users, items in ((40, 120), (3, 7)):
    rows = np.arange(users, dtype=np.int32)
    listed = np.broadcast_to(np.arange(items, dtype=np.int32), (users, items))
    out.append(np.asarray(score.call(tensors, rows, listed), np.float64).tolist())
assert not [name for name in sys.modules if name.startswith("conet_jax")]
print(json.dumps(out))
"""


@pytest.mark.parametrize(
    "variant",
    [
        "conet",
        *(pytest.param(v, marks=pytest.mark.slow) for v in ("fm", "skip", "recipe")),
        "ease_joined",
    ],
)
def test_scores_of_an_export_are_the_model_s_in_a_process_without_conet_jax(
    data, variant, tmp_path
):
    experiment = experiment_of(data, variant)
    params = parameters(experiment)
    export.save(experiment, params, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", _READER, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    projected = experiment.model.project(params, experiment.interactions)
    listed = jnp.broadcast_to(jnp.arange(120), (40, 120))
    expected = np.asarray(experiment.model.scores(projected, jnp.arange(40), listed))
    everything, some = (np.array(x) for x in json.loads(done.stdout))
    np.testing.assert_allclose(everything, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(some, expected[:3, :7], rtol=1e-6, atol=1e-6)


def test_an_export_holds_settled_parameters_and_raw_ids(data, tmp_path):
    from safetensors.numpy import load_file

    experiment = experiment_of(data, "conet")
    params = parameters(experiment)
    export.save(experiment, params, tmp_path / "out")
    found = load_file(tmp_path / "out" / "params.safetensors")
    assert len(found) == len(jax.tree.leaves(params))
    for name, table in params.tables.items():
        np.testing.assert_array_equal(found[f"tables/{name}"], table)
    np.testing.assert_array_equal(
        found["dense/target/W_0/kernel"], params.dense["target"]["W_0"]["kernel"]
    )
    for name, ids in (("users", data.user_ids), ("source_items", data.source_item_ids)):
        frame = pl.read_parquet(tmp_path / "out" / f"{name}.parquet")
        assert frame["id"].to_list() == ids.tolist()
        assert frame["row"].to_list() == list(range(len(ids)))
    with pytest.raises(InputError, match="is not empty"):
        export.save(experiment, params, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_example_that_reads_an_export_prints_the_model_s_scores(tmp_path):
    workdir, out = tmp_path / "run", tmp_path / "out"
    config = f"--config={ROOT / 'configs' / 'demo.py'}:popularity"
    assert launch("train", config, f"--workdir={workdir}").returncode == 0
    done = launch("export", f"--workdir={workdir}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert_one_line_error(launch("export", f"--workdir={workdir}", f"--out={out}"), "not empty")
    example = ROOT / "examples" / "score_without_conet_jax.py"
    done = subprocess.run(
        [sys.executable, str(example), str(out), "17", "5", "250"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    experiment, params, _ = restore(workdir)
    counts = np.bincount(experiment.dataset.target.indices, minlength=300)
    ids = experiment.dataset.target_item_ids.tolist()
    expected = [f"{item} {float(counts[ids.index(item)])}" for item in ("5", "250")]
    assert done.stdout.split("\n")[:2] == expected


def test_export_asks_for_one_of_its_two_sources():
    assert_one_line_error(launch("export", "--out=x"), "--workdir=DIR", "--data=DIR")


# RecBole's files.


def test_data_come_back_from_recbole_s_files_with_the_same_hash(data, tmp_path):
    recbole.save(data, tmp_path / "recbole")
    back = recbole.load(tmp_path / "recbole")
    assert back.meta == data.meta
    assert content_hash(back) == data.meta["hash"]
    assert [path.name for path in tmp_path.iterdir()] == ["recbole"]


def test_recbole_s_files_hold_the_split(data, tmp_path):
    recbole.save(data, tmp_path / "recbole")
    folder = tmp_path / "recbole" / "target"
    assert folder.joinpath("target.train.inter").read_text().startswith("user_id:token\titem_id:")
    lines = {
        part: [line.split("\t") for line in
               (folder / f"target.{part}.inter").read_text().splitlines()[1:]]
        for part in ("train", "valid", "test")
    }  # fmt: skip
    for part in ("valid", "test"):
        held_out = getattr(data, part)
        assert lines[part] == [
            [data.user_ids[user], data.target_item_ids[item]]
            for user, item in zip(held_out.users, held_out.items, strict=True)
        ]
    pairs = {tuple(pair) for pair in lines["train"]}
    assert len(pairs) == len(lines["train"]) == len(data.target.indices)
    for user in range(40):
        own = data.target.indices[data.target.indptr[user] : data.target.indptr[user + 1]]
        assert {(data.user_ids[user], data.target_item_ids[item]) for item in own} <= pairs


def test_masked_candidates_come_back_masked(data, tmp_path):
    mask = data.test.mask.copy()
    mask[0, 3] = False
    altered = data._replace(test=data.test._replace(mask=mask))
    recbole.save(altered, tmp_path / "recbole")
    back = recbole.load(tmp_path / "recbole")
    np.testing.assert_array_equal(back.test.mask, mask)


def altered(folder, name, change):
    path = folder / name
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("target/target.train.inter", lambda t: t + t.splitlines()[1] + "\n", "stand there twice"),
        ("target/target.train.inter", lambda t: t + "a\tb\n", "id 'a' is not listed"),
        ("target/target.test.inter", lambda t: "\n".join(t.splitlines()[:-1]), "an item for each"),
        (
            "source/source.inter",
            lambda t: t.replace("item_id", "thing"),
            "inter:1: expected tab-separated columns",
        ),
        ("dataset.json", lambda t: "{", "cannot be read as what"),
    ],
)
def test_altered_recbole_files_are_told(data, tmp_path, name, change, message):
    recbole.save(data, tmp_path / "recbole")
    altered(tmp_path / "recbole", name, change)
    with pytest.raises(InputError, match=message):
        recbole.load(tmp_path / "recbole")


def test_an_id_that_the_format_cannot_hold_is_refused(data, tmp_path):
    ids = data.user_ids.copy()
    ids[3] = "a\tb"
    with pytest.raises(InputError, match="no tab"):
        recbole.save(data._replace(user_ids=ids), tmp_path / "recbole")
    assert not list(tmp_path.iterdir())


def test_export_and_prepare_pass_the_split_on_to_recbole_and_back(data, tmp_path):
    store.save(data, tmp_path / "data")
    done = launch("export", f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'recbole'}")
    assert done.returncode == 0 and "benchmark_filename" in done.stdout, done.stderr
    done = launch("prepare", f"--recbole={tmp_path / 'recbole'}", f"--out={tmp_path / 'back'}")
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "data").iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()
    done = launch("prepare", f"--recbole={tmp_path / 'recbole'}", "--seed=3", "--out=x")
    assert_one_line_error(done, "--seed", "--recbole")
