"""Every error message of the project, each triggered: what was wrong, and how to mend it.

``MESSAGES`` lists them with a call that ends in each. The places that can raise are found in the
source; a new one that no call reaches is a failure here, so that nobody meets a message unread.
"""

import ast
import contextlib
import errno
import functools
import gzip
import importlib.util
import io
import json
import math
import os
import pathlib
import re
import runpy
import shutil
import sys
import zipfile
from unittest import mock

import hypothesis  # noqa: F401  (its plugin reads sys.argv once, before it is replaced here)
import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from absl import flags
from ml_collections import ConfigDict
from test_download import Server
from test_hostile import put_fifo

import conet_jax
from conet_jax import cli, config, devices, files, losses, metrics, optimizers, row_adam
from conet_jax.data import build as build_lib
from conet_jax.data import (
    download,
    lines,
    moments,
    prepare,
    readers,
    recbole,
    split,
    store,
    synthetic,
)
from conet_jax.data.assemble import from_arrays
from conet_jax.data.cold_users import make_cold
from conet_jax.data.load import check_users, load_dataset
from conet_jax.data.types import Dataset, HeldOut, UserItems, check_indices
from conet_jax.devices import processes
from conet_jax.errors import Diverged, InputError
from conet_jax.files import check_frames_path, make_folder, write_frames
from conet_jax.models import neighbours
from conet_jax.models.base import Params, Sizes
from conet_jax.run import checkpoints, earlier, lock, loop
from conet_jax.run import fit as fit_lib
from conet_jax.run.epoch import check_steps
from conet_jax.run.experiment import Experiment, make_experiment, untuned
from conet_jax.run.logs import load_tensorboardx
from conet_jax.run.start import initial_state
from conet_jax.run.workdir import read_ranks, restore
from conet_jax.serve import export, recommend
from conet_jax.studies import (
    clock,
    compare,
    crossing,
    drawing,
    evidence,
    figures,
    full_run,
    points,
    population,
    runner,
    search,
    statistics,
    sweep,
    table2,
    transfer,
    verdict,
)
from conet_jax.train import list_metrics, ranking
from conet_jax.train.interactions import to_device

ROOT = pathlib.Path(__file__).resolve().parent.parent
FULL = OSError(errno.ENOSPC, "No space left")
# Functions whose argument is a message.
SPEAKERS = ("fail", "_damaged", "_bad")
# Raised within a module and never seen by a user, or out of reach of one process.
UNSEEN = {
    "conet_jax/cli.py: fail(error)": "prints the others; tests/test_launch.py sees it do so",
    'conet_jax/cli.py: fail(f"{where}': "what the disk refuses; tests/test_crash.py sees it",
    'conet_jax/cli.py: fail(f"JAX_PLATFORMS': "tests/test_streams.py asks for one",
    'conet_jax/cli.py: fail(f"standard output': "tests/test_streams.py fills a device",
    "conet_jax/run/checkpoints.py: raise OSError(": "becomes the line of cli.py above",
    "conet_jax/studies/sweep.py: config.on_nonfinite is": "a reason in a row; test_numbers.py",
    "conet_jax/data/download.py: more data than announced": "the reason within another message",
    "conet_jax/data/download.py: where {have} was asked for": "the reason within another message",
}


def sites() -> list[tuple[str, int, int, str]]:
    """(file, first line, last line, text) of every statement that raises a message."""
    found = []
    for path in (*ROOT.glob("conet_jax/**/*.py"), *ROOT.glob("launch/*.py")):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            call = node.exc if isinstance(node, ast.Raise) else getattr(node, "value", None)
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if name in ("Interrupted", "CutShort"):  # no error: what a signal asked for
                continue
            if isinstance(node, ast.Raise) or name in SPEAKERS:
                where = str(path.relative_to(ROOT))
                text = " ".join(ast.get_source_segment(source, node).split())
                found.append((where, node.lineno, node.end_lineno, text))
    return found


def lines_of(error: BaseException | None) -> set[tuple[str, int]]:
    """(file, line) of the project that an error, or one that it replaced, came by."""
    found = set()
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            path = pathlib.Path(trace.tb_frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                found.add((str(path.relative_to(ROOT)), trace.tb_lineno))
            trace = trace.tb_next
        error = error.__context__
    return found


# What the calls below need.


@functools.cache
def data(third: int = 0) -> Dataset:
    pairs = [(user, item) for user in range(12) for item in range(15) if (user + item) % 3 == third]
    users, items = map(np.array, zip(*pairs, strict=True))
    return from_arrays(users, items, users, items, candidates=2)


def write(text: str | bytes, name: str = "file") -> str:
    path = pathlib.Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def read(text: str | bytes, format: str = "auto", **asked):
    return readers.read(write(text), format, **asked)


def packed(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, text in members.items():
            file.writestr(name.replace("Types", "[Content_Types].xml"), text)
    return out.getvalue()


def encrypted() -> bytes:
    """A zip archive whose member's flags say that it is encrypted."""
    text = packed(a=b"user,item\na,b\n")
    at = text.index(b"PK\x01\x02") + 8
    return text[:6] + b"\x01" + text[7:at] + b"\x01" + text[at + 1 :]


def parquet() -> bytes:
    out = io.BytesIO()
    pl.DataFrame({"user": ["a"], "item": ["b"]}).write_parquet(out)
    return out.getvalue()


def seen_broken() -> None:
    rated = rows("ax ay az bx bw cy cw", rating=[5.0, 1.0, 5.0, 5.0, 5.0, 5.0, 5.0])
    made = build_lib.build(rated, rows("ak bk cl al bm"), candidates=1)
    store.save(made, "prepared")
    np.save("prepared/seen_indptr.npy", np.flip(np.load("prepared/seen_indptr.npy")))
    store.load("prepared")


def read_ncf(**texts: str):
    given = {"train": "0\t1\n", "test": "0\t2\n", "test_neg": "(0, 2)\t3\n"} | texts
    for name, text in given.items():
        write(text, f"ncf/{name}.txt")
    return readers.read("ncf")


def rows(pairs: str, **columns: list[float]) -> readers.DomainRows:
    """Rows of users and items of one letter each, as in "ax ay bx"."""
    users, items = map(list, zip(*pairs.split(), strict=True))
    frame = pl.LazyFrame({"user": users, "item": items, **columns})
    return readers.DomainRows("rows", frame, len(users))


def build(target: str, source: str, **options):
    columns = {name: options.pop(name) for name in ("rating",) if name in options}
    return build_lib.build(rows(target, **columns), rows(source), candidates=1, **options)


def saved(name: str, change) -> None:
    """Loads prepared data of which one file was altered."""
    store.save(data(), "prepared")
    path = pathlib.Path("prepared") / name
    if name.endswith(".json"):
        meta = json.loads(path.read_text())
        change(meta)
        path.write_text(json.dumps(meta))
    else:
        np.save(path, change(np.load(path)))
    store.load("prepared")


def atomic(name: str, change) -> None:
    """Loads RecBole's files of which one was altered."""
    recbole.save(data(), "recbole")
    path = pathlib.Path("recbole") / name
    if name.endswith(".parquet"):
        change(pl.read_parquet(path)).write_parquet(path)
    else:
        path.write_text(change(path.read_text()))
    recbole.load("recbole")


def refused(error: int = errno.ENOSPC):
    """No file can be opened for writing, no folder be made."""
    broken = mock.Mock(side_effect=OSError(error, os.strerror(error)))
    return mock.patch.multiple(pathlib.Path, mkdir=broken, rename=broken, open=broken)


def under(*patches, call):
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        return call()


def fetch(plan: list, url: str | None = None, path: str = "got", retries: int = 1, **server):
    made = Server()
    made.plan = plan
    vars(made).update(server)
    import threading

    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        waits = {"retries": retries, "wait": lambda seconds: None, "timeout": 5.0}
        download.fetch(url or made.url, path, **waits)
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def valid(variant: str = "", **fields) -> None:
    made = config.default_config(variant)
    made.update_from_flattened_dict(fields)
    config.validate(made)


def changed(variant: str = "", **fields) -> ConfigDict:
    made = config.default_config(variant)
    with made.unlocked(), made.ignore_type():
        for name, value in fields.items():
            made[name] = value
    return made


def without(field: str) -> ConfigDict:
    made = config.default_config()
    del made[field]
    return made


@functools.cache
def finished() -> pathlib.Path:
    """A finished run of popularity, which takes no time."""
    folder = pathlib.Path.cwd().parent / "finished"
    fit_lib.fit(popular(), folder, dataset=data(), quiet=True)
    return folder


def popular(**fields) -> ConfigDict:
    made = config.default_config("popularity")
    made.data.dir = str(pathlib.Path.cwd().parent / "data")
    if not pathlib.Path(made.data.dir).exists():
        store.save(data(), made.data.dir)
    made.update_from_flattened_dict({"epochs": 2, "eval_k": (1,), **fields})
    return made


def run(name: str = "run", **fields) -> pathlib.Path:
    """A copy of the finished run, fields of its config altered."""
    shutil.copytree(finished(), name)
    path = pathlib.Path(name) / "config.json"
    stored = json.loads(path.read_text())
    for field, value in fields.items():
        stored["data" if field == "dir" else field] = value
    path.write_text(json.dumps(stored))
    return pathlib.Path(name)


def altered(name: str, change, folder: str = "run") -> pathlib.Path:
    """A copy of the finished run, one JSON file of it altered."""
    path = run(folder) / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return path.parent


def fit(workdir: str = "run", **fields):
    given = fields.pop("dataset", data())
    return fit_lib.fit(popular(**fields), workdir, dataset=given, quiet=True)


def without_ranks() -> pathlib.Path:
    folder = run()
    (folder / "ranks.npz").unlink()
    return folder


def all_cold() -> Dataset:
    """Data in which no item has a training pair."""
    target = data().target
    nothing = target._replace(indptr=np.zeros_like(target.indptr), indices=target.indices[:0])
    return data()._replace(target=nothing)


def no_users(split: str) -> Dataset:
    empty = HeldOut(*(x[:0] for x in getattr(data(), split)))
    return data()._replace(**{split: empty})


def trials(change=lambda row: None):
    made = popular()
    record = {"failed": "no", "dataset_hash": data().meta["hash"]}
    record["config"] = json.loads(made.to_json())
    change(record)
    write(json.dumps(record), "study/popularity/results/key.json")
    return table2.check_trials(plan(), "popularity", data())


def plan(**fields) -> table2.Study:
    get_config = {"get_config": lambda variant: popular()} | fields
    return table2.Study("demo.py", given={}, workdir=pathlib.Path("study"), **get_config)


def grid(**fields):
    given = {"points": [{}], "config": popular()} | fields
    return sweep.Sweep("demo.py", given={}, workdir=pathlib.Path("swept"), **given)


def launch(name: str, *arguments: str):
    """What ``cli.run(main)`` of a launcher does, short of ending the process."""
    before = set(flags.FLAGS)
    argv = [str(ROOT / "launch" / f"{name}.py"), *arguments]
    said = io.StringIO()
    sys.modules.pop("config_config", None)  # under which ml_collections would find the one before
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            contextlib.redirect_stderr(said),
            mock.patch.object(cli, "run") as asked,
        ):
            runpy.run_path(argv[0], run_name="__main__")
            (main,), options = asked.call_args
            rest = cli._parse(argv, arguments=options.get("arguments", False))
            main(rest[1:]) if options else main()
    except SystemExit as stop:
        assert stop.code == 2
        stop.args = (said.getvalue().removeprefix("error: ").strip(),)
        raise
    finally:
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)
        flags.FLAGS.unparse_flags()


DEMO = f"--config={ROOT / 'configs' / 'demo.py'}"


def asked(**fields) -> transfer.Question:
    """A question whose workdir holds the study of another."""
    write(json.dumps(fields), "study/question.json")
    names = {"target": "a", "source": "b"}
    return transfer.Question("demo.py", None, {}, pathlib.Path("study"), names, 60.0)


def crossed(workdirs: str, fields: dict):
    """Two copies of the finished run, fields of the second altered, given to launch/crossing.py."""
    run("run1")
    run("run2", **fields)
    return launch("crossing", f"--workdirs={workdirs}")


def config_file(body: str, *arguments: str):
    write(f"from ml_collections import ConfigDict\n{body}\n", "config.py")
    return launch("sweep", "--config=config.py", "--workdir=x", *arguments)


GET = "from conet_jax.config import default_config as get_config"

MESSAGES = [
    # Commands and flags.
    ("unknown flag --confg; did you mean --config", lambda: launch("train", "--confg=x")),
    ("flag --k=0: 0 is not a positive integer", lambda: launch("compare", "--k=0")),
    ("--config is missing: name a config file", lambda: launch("train")),
    ("config file 'nowhere.py' cannot be read", lambda: launch("train", "--config=nowhere.py")),
    (
        "--data=x is given, but this config makes its data: take --config=configs/default.py",
        lambda: launch("train", DEMO, "--data=x"),
    ),
    (
        "--k reads the ranks among candidates: leave out --full_ranking",
        lambda: launch("evaluate", "--workdir=run", "--k=5", "--full_ranking"),
    ),
    (
        "ranks.npz cannot be read as the ranks of a finished run .*leave out --k",
        lambda: launch("evaluate", f"--workdir={without_ranks()}", "--k=5"),
    ),
    (
        "--k is 'x': expected whole numbers from 1 to ",
        lambda: launch("evaluate", f"--workdir={run()}", "--k=x"),
    ),
    ("options are written --name=value", lambda: launch("train", DEMO, "stray")),
    (
        "--candidates is given twice: expected one value",
        lambda: launch("prepare", "--candidates=9", "--out=x", "--candidates=20"),
    ),
    (
        "--drop_twins is given twice",
        lambda: launch("prepare", "--drop_twins", "--nodrop_twins"),
    ),
    (
        "--config.l1 is given twice",
        lambda: launch("train", DEMO, "--config.l1=0", "--config.l1=1"),
    ),
    (
        "unknown config field config.targt_weight; did you mean config.target_weight",
        lambda: launch("train", DEMO, "--config.targt_weight=1"),
    ),
    (
        "unknown config field config.zzzzz; conet_jax/config.py lists",
        lambda: launch("train", DEMO, "--config.zzzzz=1"),
    ),
    ("flag --config.l1=half: could not convert", lambda: launch("train", DEMO, "--config.l1=half")),
    (
        "the config cannot be used: .* does not exist",
        lambda: launch("train", DEMO, "--config.l1.x=1"),
    ),
    (
        "the config file cannot be used: TypeError: 'int' object is not callable",
        lambda: config_file("get_config = 3"),
    ),
    ("expected a Python file with get_config", lambda: config_file("x = 1")),
    ("config file cannot be used: ZeroDivisionError", lambda: config_file("1 / 0")),
    ("config file cannot be used: SystemExit", lambda: config_file("raise SystemExit(0)")),
    ("^unknown variant 'conett'", lambda: launch("train", DEMO + ":conett")),
    (
        "flag --config.joined=x: expected true or",
        lambda: launch("train", DEMO, "--config.joined=x"),
    ),
    ("flag --config.data=x: expected a field", lambda: launch("train", DEMO, "--config.data=x")),
    (
        "unknown config field config.data.synthetic.num_user; did you mean config.data.synth",
        lambda: launch("train", DEMO, "--config.data.synthetic.num_user=3"),
    ),
    (
        "unknown config field config.data.zzzzz; conet_jax/config.py lists",
        lambda: launch("train", DEMO, "--config.data.zzzzz=3"),
    ),
    (
        "get_config returned int: expected a ConfigDict",
        lambda: config_file("def get_config(variant=''):\n    return 3"),
    ),
    (
        "JAX_TRANSFER_GUARD=disallow is set.*: unset JAX_TRANSFER_GUARD",
        lambda: under(
            mock.patch.dict(os.environ, JAX_TRANSFER_GUARD="disallow"),
            call=cli._refuse_debugging,
        ),
    ),
    (
        "config.platform is 'tpu', which cannot be used here",
        lambda: under(
            mock.patch.object(jax, "devices", side_effect=RuntimeError("none")),
            mock.patch.dict(os.environ),
            mock.patch.object(jax.config, "update"),
            call=lambda: cli.choose_platform(ConfigDict({"platform": "tpu"})),
        ),
    ),
    (
        "--data=x is given, but this config makes its data: take --config=configs/default.py",
        lambda: cli.take_data(demo(), "x"),
    ),
    ("module 'conet_jax' has no attribute 'prepair'", lambda: conet_jax.prepair),
    ("name the folders of runs", lambda: launch("compare")),
    ("expected one of --workdir=DIR .a model. and --data=DIR", lambda: launch("export", "--out=x")),
    (
        "'lasso': leave it out beside --methods",
        lambda: launch("figures", DEMO + ":lasso", "--workdir=x", "--methods=conet"),
    ),
    (
        "names the variant 'lasso': expected none",
        lambda: launch("transfer", DEMO + ":lasso", "--workdir=x"),
    ),
    (
        "--budget=soon: expected a time such as 90s",
        lambda: launch("transfer", DEMO, "--workdir=x", "--budget=soon"),
    ),
    (
        "with --source=FILE, or --data=DIR alone",
        lambda: launch("transfer", DEMO, "--workdir=x", "--target=y"),
    ),
    ("'lasso': expected --methods=lasso", lambda: launch("table2", DEMO + ":lasso", "--workdir=x")),
    (
        "--drop=0: expected numbers from 1",
        lambda: launch("table2", DEMO, "--workdir=x", "--drop=0"),
    ),
    (
        "random search needs both --trials=N and --space",
        lambda: launch("sweep", DEMO, "--workdir=x", "--trials=2"),
    ),
    (
        "--grid and --space are two ways",
        lambda: launch(
            "sweep", DEMO, "--workdir=x", "--grid=config.l1=0", "--trials=2", "--space=default"
        ),
    ),
    ("nothing to sweep: give --grid", lambda: launch("sweep", DEMO, "--workdir=x")),
    ("--out=DIR is needed", lambda: launch("prepare")),
    (
        "--min_rating=inf must be a finite",
        lambda: launch("prepare", "--out=x", "--target=a", "--source=b", "--min_rating=inf"),
    ),
    (
        "--twin_jaccard=2.0 must be above 0",
        lambda: launch("prepare", "--out=x", "--target=a", "--source=b", "--twin_jaccard=2"),
    ),
    (
        "--seed=-1 must be 0 or more",
        lambda: launch("prepare", "--out=x", "--target=a", "--source=b", "--seed=-1"),
    ),
    (
        "--candidates=0 must be 1 or more",
        lambda: launch("prepare", "--out=x", "--target=a", "--source=b", "--candidates=0"),
    ),
    (
        "--candidates=10 must be above --eval_k=10: .* smaller K",
        lambda: launch("prepare", "--out=x", "--target=a", "--source=b", "--candidates=10"),
    ),
    (
        "ranked with 2 candidates: expected more than --eval_k=10; ask for",
        lambda: (
            recbole.save(data(), "recbole"),
            launch("prepare", "--out=x", "--recbole=recbole"),
        ),
    ),
    (
        "--twin_users=0 must be 1 or more",
        lambda: launch("prepare", "--out=x", "--target=a", "--source=b", "--twin_users=0"),
    ),
    (
        "--recbole brings its own split: leave out --seed",
        lambda: launch("prepare", "--out=x", "--recbole=x", "--seed=1"),
    ),
    (
        "--download brings its own files",
        lambda: launch("prepare", "--out=x", "--download=amazon", "--target=a"),
    ),
    ("--target=FILE and --source=FILE are needed", lambda: launch("prepare", "--out=x")),
    (
        "expected one of --user=ID, --users=FILE and --all; found none",
        lambda: launch("recommend", "--workdir=x"),
    ),
    (
        "1 of 1 ids in ids are unknown: expected raw ids",
        lambda: (
            run(),
            write("nothing\n", "ids"),
            launch("recommend", "--workdir=run", "--all", "--items=ids"),
        ),
    ),
    ("'run1,' names an empty folder", lambda: crossed("run1,", {})),
    (
        "run2 is on other data than run1: expected runs on one",
        lambda: crossed("run1,run2", {"dataset_hash": "b"}),
    ),
    (
        "run2 is of another config than run1: config.l1 is 0.0 there and 0.5 here; expected runs",
        lambda: crossed("run1,run2", {"l1": 0.5, "seed": 3}),
    ),
    ("run1 and run2 have one seed: name one", lambda: crossed("run1,run2", {})),
    ("--methods names none", lambda: launch("figures", DEMO, "--workdir=x", "--methods=")),
    (
        "x.csv/ is a folder: expected a file",
        lambda: launch("recommend", "--workdir=x", "--all", "--out=x.csv/"),
    ),
    # Configs.
    ("unknown variant 'conett': the variants are", lambda: config.default_config("conett")),
    ("unknown variant 'ours_mlp': it is called recipe_mlp now", lambda: valid("ours_mlp")),
    ("unknown config field config.lr;", lambda: config.validate(changed(lr=1))),
    ("config.data is 3: expected fields dir", lambda: config.validate(changed(data=3))),
    ("config.data.drop is -1: expected a whole number", lambda: valid(**{"data.drop": -1})),
    (
        "config.data.cold is 9, but the data have 12 test and 12 validation users: expected so few",
        lambda: make_cold(data(), 9),
    ),
    (
        "config.data.dir is 5: expected text",
        lambda: config.validate(changed(data=ConfigDict({"dir": 5}))),
    ),
    (
        "config.data.synthetic is 5: expected the fields",
        lambda: config.validate(changed(data=ConfigDict({"synthetic": 5}))),
    ),
    (
        "config.data.dir is 'x', but this config makes its data",
        lambda: config.validate(changed(data=ConfigDict({"dir": "x", "synthetic": {}}))),
    ),
    ("config.l1 is missing: expected a number", lambda: config.validate(without("l1"))),
    (r"config.l1 is -1.0: expected a number in \[0, inf\)", lambda: valid(l1=-1.0)),
    (
        "config.layers is 64: expected at least two positive",
        lambda: config.validate(changed(layers=64)),
    ),
    ("config.layers is .63, 8.: expected at least two", lambda: valid(layers=(63, 8))),
    (
        r"config.eval_k is \(10, 10\): expected whole numbers .* once",
        lambda: valid(eval_k=(10, 10)),
    ),
    (
        "config.eval_k has 100, but a held-out item is ranked among 100: expected less; give "
        "--config.eval_k=10,99, or prepare the data with more --candidates",
        lambda: launch("train", DEMO, "--config.eval_k=100,10,99"),
    ),
    (
        "config.eval_k has 3, but a held-out item is ranked among 3: .* --config.eval_k=1, or",
        lambda: runner.plan(popular(eval_k=(3,)), data(), pathlib.Path("study")),
    ),
    ("config.cross_layers is 9: .* only 3 transitions", lambda: valid(cross_layers=9)),
    ("so expected equal widths", lambda: valid("cross_stitch", layers=(64, 32, 32, 32))),
    ("config.dtype is 'bfloat16': expected float32", lambda: valid("ials", dtype="bfloat16")),
    (
        "config.ials_alpha is 3.0, but config.ials_trials=32 searches for it",
        lambda: valid("ials", ials_alpha=3.0),
    ),
    ("config.model is 'conett': expected one of conet, ", lambda: valid(model="conett")),
    (
        "config.pretrain_epochs is 3: expected 0 with config.model=recipe",
        lambda: valid("recipe", pretrain_epochs=3),
    ),
    (
        r"config.source_layers is .64, 8.: expected as many widths as config.layers",
        lambda: valid(source_layers=(64, 8)),
    ),
    ("with config.model=recipe, .*: expected cross$", lambda: valid("recipe", inference="target")),
    (
        "cross_skip are not for config.model=recipe, .*: expected .. and 0",
        lambda: valid("recipe", cross_skip=1),
    ),
    ("which has one tower: set config.cross_layers=0", lambda: valid("mlp", cross_layers=1)),
    ("no domain has a surplus: expected repeat", lambda: valid("conet", surplus="alone")),
    # Sweeps.
    ("'l1' is no field with values", lambda: points.parse_grid(["l1"], popular())),
    ("config.l1 has the value 0.0 twice", lambda: points.parse_grid(["l1=0,1,0.0"], popular())),
    ("config.l1 is given twice", lambda: points.parse_grid(["l1=0", "l1=1"], popular())),
    ("config.seed cannot be swept: --seeds", lambda: points.parse_grid(["seed=0"], popular())),
    ("config.droput; did you mean", lambda: points.parse_grid(["droput=0"], popular())),
    ("config.l1 is 'x': expected a value as 0.0", lambda: points.parse_grid(["l1=x"], popular())),
    ("'popularity' has no space of its own", lambda: points.parse_space(["default"], popular())),
    (
        "expected a real-valued field and LOW < HIGH",
        lambda: points.parse_space(["l1=log(0,1)"], popular()),
    ),
    ("has added no point: call add", lambda: points.stored_points(lambda add: None, popular())),
    ("config.l1 is -1.0", lambda: sweep.run(grid(points=[{"l1": -1.0}]), data())),
    (
        "no list of keys",
        lambda: (
            write("{}", "swept/populations/p/members.json"),
            runner.units([], pathlib.Path("swept"), runner.VALIDATION),
        ),
    ),
    (
        "failed is no text",
        lambda: runner.read(runner.Run(popular(), "", "", pathlib.Path(write('{"failed": 3}')))),
    ),
    (
        "cannot be read as the result of a run .*a number is something else",
        lambda: (
            write(
                '{"valid": {"auc": "x"}, "valid_warm": {}, "best_epoch": 1, "epochs": 1, '
                '"seconds": 1}'
            ),
            runner.read(runner.Run(popular(), "", "", pathlib.Path("file"))),
        ),
    ),
    (
        "1 runs ended without a result .MemoryError.*fewer --members",
        lambda: under(
            mock.patch.object(runner, "work", side_effect=MemoryError),
            call=lambda: sweep.run(grid(), data()),
        ),
    ),
    (
        "no point without a failed run; see",
        lambda: under(
            mock.patch.object(search, "evaluate", side_effect=InputError("no luck")),
            call=lambda: sweep.run(grid(), data()),
        ),
    ),
    ("a search must not look at the test split", lambda: len(search.without_test(data()).test)),
    # Raw files.
    ("unknown format 'csv': expected one of", lambda: read("a,b", "csv")),
    ("ncf: --format=tsv needs a file", lambda: (read_ncf(), readers.read("ncf", "tsv"))),
    ("nowhere: no such file", lambda: readers.read("nowhere")),
    ("cannot be read: Compressed file ended", lambda: read(gzip.compress(b"a\tb\n" * 9)[:-9])),
    (
        "it is a pipe or a device: expected a regular file",
        lambda: (put_fifo(pathlib.Path("pipe")), readers.read("pipe")),
    ),
    ("the name holds a NUL character", lambda: readers.read_ids("a\0b")),
    ("the file is empty: expected an interaction", lambda: read("\n")),
    ("the line is longer than 262,144 bytes", lambda: read("a" * (1 << 18))),
    (
        "file:2: the line is longer than 16 MiB",
        lambda: read('{"user":"a","item":"b"}\n' + "a" * (1 << 24)),
    ),
    (r"file:1: not UTF-8 text: b'\\xff.*save the file as UTF-8", lambda: read(b"\xff")),
    ("a NUL character, or a stray line end", lambda: read("a\rb\tc\n")),
    ("a header, but no rows", lambda: read("user,item\n")),
    ("--format=named needs a header line", lambda: read("1,2,3\n", "named")),
    (
        "2 columns could be the user: 'user_id', 'user_id'; expected one: --user_column=NAME",
        lambda: read("user_id,user_id,item\na,b,c\n"),
    ),
    ("--format=tsv expects 2 to 4 fields separated by tabs", lambda: read("1,2\n", "tsv")),
    ("the item id is missing: 1 of 2 fields", lambda: read("user,item\na\n")),
    ("one column is asked for twice", lambda: read("a,b\nc,d\n", user_column="a", item_column="a")),
    ("--user_column=z is none of the columns", lambda: read("a,b\nc,d\n", user_column="z")),
    ("no column is known to be the user: found", lambda: read("rating,item,x\n1,b,c\n")),
    ("--user_column=9: expected a number from 1 to 2", lambda: read("1\t2\n", user_column="9")),
    ("--item_column is missing: without a header", lambda: read("1\t2\n", user_column="1")),
    ("is a tar archive: unpack it", lambda: read(bytes(257) + b"ustar" + bytes(300))),
    ("is stored Python objects: save it as CSV or Parquet", lambda: read(b"\x80\x04x")),
    ("is a Parquet file: expected text", lambda: readers.read_ids(write(parquet()))),
    ("is an Excel workbook or another document", lambda: read(packed(Types=b"x", b=b"y"))),
    ("a zip archive of 2 files .a, b.: expected one", lambda: read(packed(a=b"x", b=b"y"))),
    ("file: a in it is encrypted: unpack it first", lambda: read(encrypted())),
    ("not the text that its first bytes promise", lambda: read(b"\xff\xfea")),
    ("--separator, --header and .* are for text files", lambda: read(parquet(), separator=",")),
    ("the table is int: expected a Polars or pandas|the table cannot", lambda: readers.read(7)),
    ("the table is list: expected a Polars", lambda: readers.read([["a"]])),
    ("the table cannot be read: ", lambda: readers.read({"user": ["a", "b"], "item": ["c"]})),
    ("content does not tell which column is the user", lambda: read("1,2,3\n")),
    (
        "expected a JSON object with a user and an item on every line",
        lambda: read("a,b", "amazon_json"),
    ),
    ("text follows the JSON array", lambda: read('[{"user":"a","item":"b"}] x')),
    ("not JSON .expected , or ] after an object", lambda: read('[{"user":"a","item":"b"} x]')),
    ("file:1: not UTF-8 text; save", lambda: read(b'[{"user":"a","item":"\xff"}]')),
    (
        "a JSON array of more than 2 GiB: expected an object a line",
        lambda: under(
            mock.patch.object(lines, "_ARRAY_BYTES", 9), call=lambda: read('[{"user":"a"}]')
        ),
    ),
    (
        "file:1002: the key 'rating' first stands here",
        lambda: read('{"user":"a","item":"b"}\n' * 1001 + '{"rating":1,"user":"a","item":"b"}'),
    ),
    ("file:2: not JSON", lambda: read('{"user":"a","item":"b"}\n{')),
    (
        "file:2: not JSON .nested too deeply",
        lambda: read('{"user":"a","item":"b"}\n' + "[" * 10**5),
    ),
    ("file:2: expected a JSON object on every line", lambda: read('{"user":"a","item":"b"}\n[]')),
    ("file:2: 3 fields where 2 are expected", lambda: read("a\tb\na\tb\tc\n")),
    (
        "a field of more than 131,072 characters: shorten it",
        lambda: read("a\tb\na\t" + "b" * 131_073),
    ),
    ("a quote is opened and not closed, or text follows it", lambda: read('user,item\n"a"b,c\n')),
    (
        "a quote is opened and not closed: .*an id holds no line end",
        lambda: read('user,item\n"a\nb",c\n'),
    ),
    ("no row is left .1 without an id, 0 that cannot", lambda: read("user,item\nNULL,b\n")),
    ("bad item id True: expected text or a whole number", lambda: read('{"user":"a","item":true}')),
    (r"bad item id 'b\\nc': expected no line end", lambda: read(r'{"user":"a","item":"b\nc"}')),
    ("half of a UTF-16 surrogate pair", lambda: read(r'{"user":"a","item":"\ud800"}')),
    ("the rating is missing: expected a number", lambda: read("a\tb\t1\na\tb\t\n")),
    ("bad rating 'x': expected a finite number", lambda: read("a\tb\tx\n")),
    ("the timestamp is missing: expected one in", lambda: read("a\tb\t1\t1\na\tb\t1\t\n")),
    ("bad timestamp 'x': expected a finite number, or a date", lambda: read("a\tb\t1\tx\n")),
    (
        "bad weight '0': expected a number above 0, from 1e-30 to 1e\\+30; --skip_bad_rows",
        lambda: read("user_id,item_id,plays\na,b,0\n", weight_column="plays"),
    ),
    (
        "the columns of NCF-style data are fixed",
        lambda: (read_ncf(), readers.read("ncf", user_column="x")),
    ),
    ("test_neg.txt: the file is empty: expected the negatives", lambda: read_ncf(test_neg="\n")),
    ("ids:1: not UTF-8 text", lambda: readers.read_ids(write(b"\xff", "ids"))),
    ("X.train.rating: no such file; NCF-style data is", lambda: readers.read("X", "ncf")),
    ("user '0' has more than one test item", lambda: read_ncf(test="0\t2\n0\t3\n")),
    ("no line for user '1' of", lambda: read_ncf(test="0\t2\n1\t2\n")),
    ("expected '.user, item.' and items", lambda: read_ncf(test_neg="0 2 3\n")),
    (".0, 3. is not in the test file", lambda: read_ncf(test_neg="(0, 3)\t4\n")),
    ("a second line for user '0'", lambda: read_ncf(test_neg="(0, 2)\t3\n" * 2)),
    ("ids: the file is empty: expected an id a line", lambda: readers.read_ids(write("", "ids"))),
    ("ids:1: an empty line; expected an id", lambda: readers.read_ids(write("\na", "ids"))),
    # Raw rows to a data set.
    (
        "no rating is 4 or more, the largest is 1; lower --min_rating",
        lambda: build("ax", "ax", rating=[1.0], min_rating=4),
    ),
    (
        "--min_rating=3 is given, but no rating is read .left out: no column",
        lambda: build("ax", "ax", min_rating=3),
    ),
    (
        "ncf: brings its own test items and users: leave out --min_user_items=2",
        lambda: build_lib.build(read_ncf(), rows("0x"), min_user_items=2),
    ),
    (
        "no user is left: expected users with some of the items",
        lambda: build_lib.build(read_ncf(), rows("0x")),
    ),
    (
        "no user is left: those who were have every item of a domain",
        lambda: build("ax", "ax"),
    ),
    (
        "unknown option 'min_ratings'; did you mean min_rating",
        lambda: prepare.prepare("a", "b", min_ratings=3),
    ),
    ("both files are -: expected one of them", lambda: prepare.prepare("-", "-")),
    (
        "file: no rating is read, and 'stars' was in the source",
        lambda: prepare.positives_of(
            {"reading": {"source": {"columns": {"rating": "stars"}}}, "options": {}},
            "source",
            write("user,item\na,b\n"),
        ),
    ),
    (
        "dataset.json does not say how .* it was altered; prepare again",
        lambda: prepare.positives_of(
            {"reading": {"source": {"asked": {"separator": 5}}}, "options": {}}, "source", "file"
        ),
    ),
    ("has no attribute 'prepares'", lambda: conet_jax.prepares),
    ("--split=latest needs timestamps; use", lambda: build("ax", "ax", split="latest")),
    ("no user id occurs in both .* must be spelled alike", lambda: build("ax", "bx")),
    ("the core is empty: .* lower them", lambda: build("ax", "ax", min_user_items=2)),
    (
        "no source item is left after --drop_twins: leave it out",
        lambda: build(
            "ax bx ay bz cz", "ak bk cl", drop_twins=True, twin_jaccard=0.1, twin_users=1
        ),
    ),
    ("no user has two target items or more", lambda: build("ax by", "ax by")),
    (
        "user '0' has all 2 target items: no untouched one",
        lambda: from_arrays([0, 0], [0, 1], [0], [0], candidates=1),
    ),
    (
        "has 1 untouched target items, fewer than the 2 candidates wanted: --candidates=1 or less",
        lambda: build_lib.build(rows("ax ay bz"), rows("ax by"), candidates=2),
    ),
    (
        "has all 1 items of the source as training positives",
        lambda: from_arrays([0, 0, 1], [0, 1, 2], [0, 1], [0, 0], candidates=1),
    ),
    (
        "no negative left in the given test candidates: .* remove",
        lambda: build_lib.build(
            read_ncf(train="0\t3\n1\t4\n", test="0\t2\n1\t5\n", test_neg="(0, 2)\t3\n(1, 5)\t6\n"),
            rows("0x 1y"),
        ),
    ),
    (
        "candidates=0 must be 1 or more",
        lambda: from_arrays([0], [0], [0], [0], candidates=0),
    ),
    (
        "target: item index out of range 0 .. 0",
        lambda: from_arrays([0], [5], [0], [0], num_target_items=1),
    ),
    (
        "not every user of 0 .. 1 occurs: expected each in both",
        lambda: from_arrays([0], [0], [1], [0]),
    ),
    (
        "unknown split 'x': expected random or",
        lambda: split.leave_one_out([0, 3], split="x", seed=0),
    ),
    (
        "^--split=latest needs timestamps; use",
        lambda: split.leave_one_out([0, 3], split="latest", seed=0),
    ),
    (
        "a user has too few untouched items",
        lambda: split.draw_candidates([0, 1], [0], 1, [0], 1, None),
    ),
    (
        "synthetic noise must be at least 0.001, got 0",
        lambda: synthetic.generate(**SIZES, noise=0, seed=0),
    ),
    (
        "synthetic target_interactions must be from 9",
        lambda: synthetic.generate(**SIZES | {"target_interactions": 1}, seed=0),
    ),
    (
        "--ratios is for --split=ratio: leave it out, or give both",
        lambda: build("ax ay", "ax", ratios=(8, 1, 1)),
    ),
    (
        "--ratios=8,1: expected three whole numbers from 1 to 1,000,000",
        lambda: build("ax ay", "ax", split="ratio", ratios=["8", "1"]),
    ),
    (
        "--ratios=0.8,0.1,0.1: expected three whole numbers",
        lambda: from_arrays([0], [0], [0], [0], split="ratio", ratios=(0.8, 0.1, 0.1)),
    ),
    # Time.
    (
        "--split=time and --cutoff=DATE go together: give both",
        lambda: build("ax ay", "ax", split="time"),
    ),
    (
        "--keep_future is for --split=latest: leave it out",
        lambda: build("ax ay", "ax", keep_future=True),
    ),
    (
        "brings its own test items and users: leave out --split=latest",
        lambda: build_lib.build(read_ncf(), rows("0x"), split="latest"),
    ),
    (
        "--cutoff=soon: expected a date as 2014-07-01, a share",
        lambda: moments.cutoff("soon", np.arange(3.0)),
    ),
    (
        "--cutoff=0.5: no target interactions are left to part by it: expected some before",
        lambda: moments.cutoff("0.5", np.arange(0.0)),
    ),
    (
        "--cutoff=2001-01-01: 3 of 3 target interactions come before it: expected some before",
        lambda: moments.cutoff("2001-01-01", np.arange(3.0)),
    ),
    (
        "the source has no timestamps: use --keep_future",
        lambda: from_arrays(
            [0, 0], [0, 1], [0], [0], split="latest", target_timestamps=np.arange(2.0)
        ),
    ),
    (
        "no source row comes before .* use --keep_future",
        lambda: from_arrays(
            *([0, 0], [0, 1], [0], [0]),
            split="latest",
            target_timestamps=np.arange(2.0),
            source_timestamps=np.ones(1),
        ),
    ),
    (
        "no user has a target item from --cutoff on that others had before it",
        lambda: build_lib.build(
            rows("ax bz bw", timestamp=[1.0, 1.0, 3.0]),
            rows("ax bz", timestamp=[1.0, 1.0]),
            candidates=1,
            split="time",
            cutoff="2",
        ),
    ),
    # Prepared data.
    ("exists and is not a directory; name another", lambda: store.check_writable(write("x"))),
    (
        "prepared: cannot be written: Permission denied; see to it",
        lambda: under(
            mock.patch.object(
                pathlib.Path,
                "iterdir",
                side_effect=PermissionError(errno.EACCES, "Permission denied"),
            ),
            call=lambda: (os.mkdir("prepared"), store.check_writable("prepared")),
        ),
    ),
    (
        "not a prepared data set .it holds mine., so it is not replaced",
        lambda: store.check_writable(pathlib.Path(write("x", "d/mine")).parent),
    ),
    (
        "is not empty; expected a new or empty folder",
        lambda: store.check_new(pathlib.Path(write("x", "d/mine")).parent),
    ),
    (
        "out: cannot be written: No space left",
        lambda: under(refused(), call=lambda: recbole.save(data(), "out")),
    ),
    (
        "prepared: cannot be written: No space left",
        lambda: under(refused(), call=lambda: store.save(data(), "prepared")),
    ),
    ("no prepared data here .*run prepare", lambda: store.load("nowhere")),
    ("not readable as the description", lambda: saved("dataset.json", lambda x: x.pop("hash"))),
    ("format 2 where 1 is expected", lambda: saved("dataset.json", lambda x: x.update(format=2))),
    (
        "counts of shared_users, .* do not add up to the users",
        lambda: saved("dataset.json", lambda x: x["counts"].update(shared_users=1)),
    ),
    (
        "counts.target_density differs from the arrays",
        lambda: saved("dataset.json", lambda x: x["counts"].update(target_density=0.5)),
    ),
    (
        "the file is missing",
        lambda: (store.save(data(), "d"), os.remove("d/test_mask.npy"), store.load("d")),
    ),
    (
        "cannot be read .*would require allow_pickle|cannot be read",
        lambda: saved("test_users.npy", lambda x: x.astype(object)),
    ),
    ("not an array of type <i4", lambda: saved("test_users.npy", lambda x: x.astype(float))),
    ("target: row pointers that do not increase", lambda: saved("target_indptr.npy", np.flip)),
    ("test: pairs that are not strictly increasing", lambda: saved("test_users.npy", np.flip)),
    ("seen: row pointers that do not increase", lambda: seen_broken()),
    ("user_ids: ids for 12 rows expected", lambda: saved("user_ids_offsets.npy", lambda x: x[1:])),
    ("user_ids: offsets that do not increase", lambda: saved("user_ids_offsets.npy", np.flip)),
    ("the content does not match its hash", lambda: saved("valid_mask.npy", np.invert)),
    # RecBole's files.
    (
        r"id 'a\\tb' cannot be written: expected no tab",
        lambda: recbole.save(data()._replace(user_ids=np.array(["a\tb"], object)), "x"),
    ),
    ("nowhere: no such folder: expected what launch/export", lambda: recbole.load("nowhere")),
    ("cannot be read as what launch/export.py --data writes", lambda: recbole.load(".")),
    (
        "a field or column is of another type",
        lambda: atomic("candidates.parquet", lambda frame: frame.drop("part")),
    ),
    ("no ids: expected one a line", lambda: atomic("target/target.user", lambda t: t[:14])),
    ("id '0' stands there twice", lambda: atomic("target/target.user", lambda t: t + "0\n")),
    ("target.user: expected the same", lambda: atomic("source/source.user", lambda t: t + "x\n")),
    (
        "source.inter:2: bad weight 'x': expected a finite number",
        lambda: atomic(
            "source/source.inter", lambda t: "user_id:token\titem_id:token\tweight:float\n0\t0\tx\n"
        ),
    ),
    ("1 pairs stand there twice", lambda: atomic("source/source.inter", lambda t: t + "0\t0\n")),
    (
        "id 'x' is not listed in the .user or .item file",
        lambda: atomic("source/source.inter", lambda t: t + "x\t0\n"),
    ),
    (
        "expected tab-separated columns user_id:token",
        lambda: atomic("target/target.user", str.upper),
    ),
    (
        "expected 1 fields separated by tabs",
        lambda: atomic("target/target.user", lambda t: t + "\n"),
    ),
    (
        "expected an item for each list that candidates.parquet has for test",
        lambda: atomic("target/target.test.inter", lambda t: t[: t.rfind("\n", 0, -1) + 1]),
    ),
    ("a pair stands in the training data or another part", lambda: twice()),
    (
        "a candidate for .* is among the user's own items",
        lambda: atomic(
            "candidates.parquet",
            lambda frame: frame.with_columns(pl.lit([own_item(), own_item()]).alias("candidates")),
        ),
    ),
    (
        "lists of unequal length",
        lambda: atomic(
            "candidates.parquet", lambda frame: frame.with_columns(pl.col("counts").list.head(1))
        ),
    ),
    (
        "id 'x' is not listed in the .item file",
        lambda: atomic(
            "candidates.parquet",
            lambda frame: frame.with_columns(pl.lit(["x", "x"]).alias("candidates")),
        ),
    ),
    # Downloads.
    ("only http and https addresses", lambda: fetch([], url="file:///etc/passwd")),
    ("only http and https addresses", lambda: fetch([302], location="ftp://127.0.0.1/x")),
    ("cannot be downloaded: status 404", lambda: fetch([404])),
    ("cannot be downloaded: the connection broke off, 2 attempts in a row", lambda: fetch([0, 0])),
    ("range from 93 where 100 was asked for", lambda: fetch([100, *["wrong range"] * 3])),
    (
        "more data than announced",
        lambda: under(
            mock.patch.object(download, "_content_range", return_value=(100, 101)),
            call=lambda: fetch([100, "all"], retries=0),
        ),
    ),
    ("file/got: cannot be written", lambda: fetch([], path=write("x") + "/got")),
    # Runs.
    (
        "no prepared data in nowhere; make it with",
        lambda: fit(dataset=None, **{"data.dir": "nowhere"}),
    ),
    (
        "config.data.synthetic.num_userz is 3: expected one of",
        lambda: load_dataset(demo(num_userz=3)),
    ),
    (
        "config.data.synthetic.seed is 'x': expected a number, int",
        lambda: load_dataset(demo(seed="x")),
    ),
    (
        "no valid item has a training pair, .* prepare the data with --min_item_users=3",
        lambda: check_users(all_cold(), "valid"),
    ),
    (
        "config.negatives_avoid_seen is True, but the data have no target pairs below",
        lambda: make_experiment(changed("mlp", negatives_avoid_seen=True), data()),
    ),
    (
        "the data set has no valid users: .* prepare it from more",
        lambda: fit(dataset=no_users("valid")),
    ),
    (
        "'popularity', which is fitted on one device: expected one process",
        lambda: under(
            mock.patch.object(jax, "process_count", return_value=2),
            mock.patch.object(devices, "mesh"),
            call=fit,
        ),
    ),
    (
        "an epoch of .* is too long for int32",
        lambda: make_experiment(changed("mlp", negatives=2**31 - 1), data()),
    ),
    (
        "run holds a run of another config: config.seed is 0 there and 1 here",
        lambda: fit(str(run()), seed=1),
    ),
    (
        "config.eval_k begins with 1 there and with 2 here: its first K has chosen the epochs",
        lambda: fit(str(run()), eval_k=(2, 1)),
    ),
    (
        "run holds a run under other settings of JAX.*: JAX_ENABLE_X64 is true there and false here"
        ".*Set them as there, or take another --workdir",
        lambda: fit(str(altered("config.json", under_x64))),
    ),
    (
        "run holds a run on other data: its hash",
        lambda: fit(str(run()), dataset=data()._replace(meta=data().meta | {"hash": "f" * 64})),
    ),
    ("d is not empty and holds no run; take another", lambda: (write("x", "d/x"), fit("d"))),
    ("cannot write to run: No space left", lambda: under(refused(), call=fit)),
    ("nowhere holds no run .no config.json.; train it", lambda: restore("nowhere")),
    ("dataset_hash or jax_settings is of another type", lambda: restore(run(dataset_hash=3))),
    (
        "config.json cannot be read as a run's config .*config.seed is -1",
        lambda: restore(run(seed=-1)),
    ),
    (
        "config.json cannot be read as a run's config .started_from names no folder",
        lambda: restore(run(started_from={"workdir": 3})),
    ),
    (
        "--start_from=x: config.model=popularity has a closed form",
        lambda: fit_lib.fit(popular(), "w", dataset=data(), quiet=True, start_from="x"),
    ),
    (
        "--start_from=x: config.model=lightgcn learns all users and items of one graph",
        lambda: fit_lib.fit(
            changed("lightgcn", eval_k=(1,)), "w", dataset=data(), quiet=True, start_from="x"
        ),
    ),
    (
        "--start_from=run is a run of config.model=popularity: expected config.model=mlp",
        lambda: earlier.load(run(), untuned(changed("mlp"), data())),
    ),
    (
        r"--start_from=x is a run whose tables/target_item is .64,. where .4,. is expected",
        lambda: earlier._check(
            "x", *(untuned(changed("ials", layers=w), data()) for w in ((128, 64), (8, 4)))
        ),
    ),
    (
        "config.json cannot be read as a run's config .it is of version 0.1, .*train it again",
        lambda: restore(run(warm_start="")),
    ),
    (
        "the data given are not those of run: hash .* give those that it was fitted on",
        lambda: restore(run(dataset_hash="f" * 64), data=data()),
    ),
    (
        "the data of run were in memory, in no folder: give them again by data=",
        lambda: restore(run(dir={"dir": ""}, dataset_place={})),
    ),
    (
        "config.epochs is 'x': expected a whole number from 1 to",
        lambda: conet_jax.fit(data(), "run", epochs="x"),
    ),
    (
        "none of the items is known: expected raw ids of target items",
        lambda: conet_jax.load(run(), data=data()).recommend(items=["x"]),
    ),
    (
        "is not that of run: hash .* prepare it as it was",
        lambda: restore(run(dataset_hash="f" * 64)),
    ),
    (
        "--data=x is given, but run makes its data: leave it out",
        lambda: restore(run(dir=json.loads(demo().data.to_json())), data="x"),
    ),
    (
        "the data of run are not in nowhere.*name their folder by --data=DIR, or make them again: "
        "python launch/prepare.py",
        lambda: restore(run(dir={"dir": "nowhere", "drop": 0}, dataset_place={})),
    ),
    ("dataset_place is of another type", lambda: restore(run(dataset_place={"folder": 3}))),
    (
        "run holds no checkpoint yet",
        lambda: (shutil.rmtree(run() / "checkpoints"), restore("run")),
    ),
    (
        "run holds no checkpoint yet",
        lambda: (shutil.rmtree(run() / "checkpoints" / "latest"), restore("run")),
    ),
    (
        "the checkpoint in .* is damaged .* no earlier one is whole: train anew",
        lambda: (
            [os.remove(path) for path in run().rglob("*") if path.name == "_METADATA"],
            restore("run"),
        ),
    ),
    (
        "the checkpoint in .* is damaged, or of another config",  # of a version without hashes
        lambda: (
            [
                os.remove(path)
                for path in run().rglob("*")
                if path.name in ("_METADATA", "hashes.json")
            ],
            restore("run"),
        ),
    ),
    (
        "run holds no checkpoint yet",  # stopped in its first epoch
        lambda: under(resumed(epoch=0), call=lambda: restore(run())),
    ),
    ("owned is in use by process .*: wait until", lambda: owned_twice()),
    ("cannot write to nowhere: No such file .*take another", lambda: owned("nowhere")),
    (
        "cannot write to run: No space left; take another",
        lambda: under(
            mock.patch(
                "conet_jax.run.workdir.write_config", side_effect=OSError(28, "No space left")
            ),
            call=fit,
        ),
    ),
    (
        r"a is \(3, 2\), where \(3, 1\) was expected",
        lambda: checkpoints._check_widths({"a": np.zeros((3, 1))}, {"a": np.zeros((3, 2))}),
    ),
    (
        "config.epochs is 1, but the run in run has done 2; give as many",
        lambda: under(resumed(epoch=2), call=lambda: fit(str(run()), epochs=1)),
    ),
    (
        "the target loss is not finite at step 6 .*start anew",
        lambda: check_steps(
            {"target_loss": np.array([math.nan])},
            5,
            1,
            initial_state(make_experiment(changed("mlp"), data())),
        ),
    ),
    ("tables/user is not finite; .*larger config.ials_regul", lambda: end_of_epoch(math.nan)),
    (
        "h is nan; .*larger config.ials_regularization",
        lambda: under(
            mock.patch.object(loop, "validate", side_effect=Diverged("h is nan")),
            call=lambda: end_of_epoch(1.0),
        ),
    ),
    ("h is nan: the run has diverged; lower config.learning_rate", lambda: diverged()),
    ("h is nan, after 5 rollbacks: start anew", lambda: rolled_back()),
    (
        "user 9 is out of range: expected 0 to 4",
        lambda: check_indices("user", np.array([0, 9]), 5),
    ),
    (
        "1 of 2 users have a NaN or infinite score .*lower config.learning_rate",
        lambda: ranking.rank_scores(np.array([[1.0, math.nan], [0, 1]]), np.ones((2, 1), bool)),
    ),
    (
        "EASE inverts a matrix .*take another model",
        lambda: initial_state(make_experiment(changed("ease", max_items=3), data())),
    ),
    (
        "config.model=emcdr learns its map on users .* in both domains, and there are none",
        lambda: make_experiment(
            changed("emcdr"),
            data()._replace(source=UserItems(np.zeros(13, int), np.zeros(0, int), 5)),
        ),
    ),
    (
        "ease_bridged inverts a matrix .*take another model",
        lambda: initial_state(make_experiment(changed("ease_bridged", max_items=1), data())),
    ),
    (
        "--coordinator, --num_processes and --process_id come together",
        lambda: processes.start("a:1", 2, None),
    ),
    ("--process_id is 2: expected 0 to 1", lambda: processes.start("a:1", 2, 2)),
    ("--coordinator is 'a': expected HOST:PORT", lambda: processes.start("a", 2, 1)),
    (
        "cannot be joined .no.: start the same command on each",
        lambda: under(
            mock.patch.object(jax.distributed, "initialize", side_effect=RuntimeError("no")),
            mock.patch.object(jax.config, "update"),
            call=lambda: processes.start("a:1", 2, 1),
        ),
    ),
    ("config.devices is 99: expected 0 .all., or a number up to", lambda: devices.mesh(99)),
    ("what process 0 says", lambda: together("what process 0 says")),
    ("another process of this run died .*the same commands again", lambda: lost()),
    # What runs, studies and figures have left.
    (
        "the run in run has no result yet; go on with it",
        lambda: (os.remove(run() / "result.json"), compare.read("run", "test")),
    ),
    (
        "cannot be read as a finished run .*a number is something else",
        lambda: compare.read(altered("result.json", lambda x: x.update(epochs="x")), "test"),
    ),
    (
        "no result of a run: .*a field is of another type",
        lambda: compare.read(altered("result.json", lambda x: x.update(config=1)), "test"),
    ),
    ("'test_users.npy' in the archive", lambda: ranks(x=np.zeros(3, int))),
    (
        "test_users is compressed: expected what numpy.savez writes",
        lambda: (
            np.savez_compressed("ranks.npz", test_users=np.zeros(3)),
            files.read_arrays("ranks.npz", ["test_users"]),
        ),
    ),
    ("arrays of another shape or type", lambda: ranks(**dict.fromkeys(RANKS, np.zeros(3)))),
    ("a rank beyond the candidates", lambda: ranks(**dict.fromkeys(RANKS, np.ones(3, int)))),
    ("nested too deeply", lambda: files.parse_json("[" * 10**5)),
    (
        "larger than 64 MiB",
        lambda: under(
            mock.patch.object(files, "JSON_BYTES", 64 << 20), call=lambda: files.read_json(large())
        ),
    ),
    ("bytes after the end of the array", lambda: longer_array()),
    ("Unable to allocate", lambda: files.read_array(promise())),
    (
        "run2 is a run on other data than run1: .* name runs on one data set",
        lambda: compare.report(
            [
                run("run1"),
                altered("result.json", lambda x: x["dataset"].update(hash="f" * 64), "run2"),
            ]
        ),
    ),
    (
        "run1 and run2 hold one config twice with the same seed: name one",
        lambda: compare.report([run("run1"), run("run2")]),
    ),
    (
        "config.neighbours is 4, and there are 16,777,216 items: expected fewer than",
        lambda: neighbours.fit({}, Sizes(1, 1 << 24, 0), ("target",), 4, ("target",)),
    ),
    (
        "figures need matplotlib: pip install",
        lambda: under(
            mock.patch.dict(sys.modules, {"matplotlib": None}), call=drawing.load_matplotlib
        ),
    ),
    (
        "event files need tensorboardX: pip install",
        lambda: under(
            mock.patch.dict(sys.modules, {"tensorboardX": None}),
            call=load_tensorboardx,
        ),
    ),
    (
        "an export needs flatbuffers: pip install",
        lambda: under(
            mock.patch.object(importlib.util, "find_spec", return_value=None),
            call=lambda: export.check_writable("x"),
        ),
    ),
    (
        "unknown method 'mpl' .did you mean mlp..: the methods are",
        lambda: table2.run(plan(), ["mpl"]),
    ),
    ("no method is named: the methods are", lambda: table2.run(plan(), [])),
    (
        "study holds a run .config.json.: take another --workdir",
        lambda: (run("study"), table2.run(plan(), ["popularity"])),
    ),
    (
        "point 1 .data.dir=b. has other validation items than the points before",
        lambda: (
            store.save(data(), "a"),
            store.save(data(third=1), "b"),
            sweep.run(grid(points=[{"data.dir": "a"}, {"data.dir": "b"}])),
        ),
    ),
    (
        "popularity: no luck",
        lambda: under(
            mock.patch.object(table2, "tune", side_effect=InputError("no luck")),
            mock.patch.object(table2, "load_dataset", return_value=data()),
            call=lambda: table2.run(plan(), ["popularity"]),
        ),
    ),
    (
        "the trial in .* is of another search: the data's hash",
        lambda: trials(lambda row: row.update(dataset_hash="x")),
    ),
    (
        "cannot be read as a trial .KeyError.'config'..; take it away",
        lambda: trials(lambda row: row.pop("config")),
    ),
    (
        "cannot be read as a run's result .*take it away, and it is made again",
        lambda: full_run.read(done("{", "result.json")),
    ),
    (
        "run holds a run of another config: config.seed is 0 there and 3 here",
        lambda: (run(), full_run.read(full_run.plan(popular(seed=3), data(), RUN, ""))),
    ),
    (
        "it is not of the data's test users",
        lambda: (
            run(),
            full_run.test_ndcg(
                full_run.plan(popular(), data(), RUN, ""), no_users("test"), np.arange(1)
            ),
        ),
    ),
    (
        "figure 3a is of methods with a lasso penalty",
        lambda: figures.points("3a", {"conet": config.default_config("conet")}, 1),
    ),
    (
        "the figures are of CoNet, and mlp has config.model=mlp",
        lambda: figures.points("2a", {"mlp": config.default_config("mlp")}, 1),
    ),
    (
        "figure 3b, run 1 of 1: lasso seed=0 failed: no luck",
        lambda: under(
            mock.patch.object(population, "train", return_value=[{"failed": "no luck"}]),
            call=lambda: figures.write(
                ["3b"],
                {"lasso": changed("lasso", eval_k=(1,))},
                "figures",
                seeds=1,
                dataset=data(),
            ),
        ),
    ),
    # Recommendations and files for other programs.
    (
        "user 'x' is in neither domain of the data: .*--fallback=popularity",
        lambda: recommend.find_users(recommend.load(run()), ["x"]),
    ),
    (
        "--include_cold: this model knows nothing of an item without training pairs; leave it out",
        lambda: recommend.recommend(recommend.load(run()), [], include_cold=True),
    ),
    ("a score of user '0' is NaN or infinite: the run has diverged; lower", lambda: nan_scores()),
    (
        "expected a name that ends in .csv",
        lambda: check_frames_path(pathlib.Path("x.txt")),
    ),
    (
        "cannot write to file: File exists; see to it",
        lambda: make_folder(pathlib.Path(write("x"))),
    ),
    (
        "cannot write to file/y.csv: .*; see to it",
        lambda: write_frames(pathlib.Path(write("x")) / "y.csv", [pl.DataFrame()]),
    ),
    (
        "the model has no cross connections to switch: expected",
        lambda: crossing.switched(mock.Mock(uncrossed=None), None, {}, "off"),
    ),
    # Functions to lift out: errors of programmers.
    ("reduction must be one of", lambda: losses.binary_cross_entropy(ONES, ONES, reduction="x")),
    ("the last axis holds the examples", lambda: losses.binary_cross_entropy(1.0, 1.0)),
    ("do not broadcast to", lambda: losses.binary_cross_entropy(ONES, ONES, weights=jnp.ones(2))),
    (
        r"logits \(3,\) and labels \(2,\) differ",
        lambda: losses.binary_cross_entropy(ONES, jnp.ones(2)),
    ),
    ("positive_logits .* differ in shape", lambda: losses.bpr_loss(ONES, jnp.ones(2))),
    (
        "reduction must be 'sum' or 'mean'",
        lambda: losses.joint_loss(ONES, ONES, ONES, ONES, target_weight=0.5, reduction="none"),
    ),
    ("counts of candidates must be integers", lambda: metrics.ndcg(ONES, ONES, k=10)),
    ("the cut k must be an integer", lambda: metrics.ndcg(ints(), ints(), k=0)),
    (
        "lists are of items with a training pair, and one of these has none",
        lambda: metrics.summarize_lists(ints() - 1, ints() - 1, ints() - 1),
    ),
    ("there is no user to average over", lambda: metrics.summarize(*[ints()[:0]] * 3, k=1)),
    (
        "there is no user to average over",
        lambda: list_metrics.summarize(ints()[:0], ranking.Ranks(*[ints()[:0]] * 3), k=1),
    ),
    (
        "user 0 has 1 candidates above and 1 tied of 1",
        lambda: metrics.summarize(*[ints()] * 3, k=1),
    ),
    (
        "add_l1 needs the parameters",
        lambda: optimizers.add_l1(1.0).update(ONES, optax.EmptyState()),
    ),
    (
        "wraps an optimiser with one Adam, found 0",
        lambda: proximal(optax.sgd(0.1), ONES),
    ),
    ("proximal_l1 needs the parameters", lambda: proximal(optax.adam(0.1), None)),
    ("method must be one of", lambda: optimizers.l1_adam(0.1, method="x")),
    ("need 0 <= b1 < 1", lambda: row_adam.row_adam(b1=2.0)),
    ("num_steps of at least 1", lambda: row_adam.row_adam(lambda step: 0.1, num_steps=0)),
    ("a table is float32 or float64", lambda: row_adam.row_adam().init(ints())),
    (r"items must lie in \[0, 2\)", lambda: to_device([0, 1], [5], 2)),
    ("items must be strictly increasing", lambda: to_device([0, 2], [1, 0], 3)),
    ("user 0 has all 1 items", lambda: to_device([0, 1], [0], 1)),
    ("expected the same two users or more", lambda: statistics.paired_t_test([1.0], [1.0])),
    (
        "expected .seeds, users. of the same users",
        lambda: verdict.gain(np.ones((1, 3)), np.ones((1, 4))),
    ),
    (
        "expected two users or more, got 1",
        lambda: verdict.gain(np.ones((1, 1)), np.ones((1, 1))),
    ),
    (
        "cannot be read as the ranks of a run .*; take run away",
        lambda: evidence.ndcg_of(RUN / "ranks.npz", "test", 10),
    ),
    ("none of popularity, ials, recipe_mlp could be trained", lambda: evidence.baseline_of({})),
    (
        "plan.json cannot be read as what a study has decided",
        lambda: clock.stored(pathlib.Path(write('{"trials": "x"}', "plan.json")), "trials", (int,)),
    ),
    (
        "study of another question: its data is x there and",
        lambda: transfer.claim(asked(data="x"), data()),
    ),
    (
        "study of other data: --target=a there and b here. Take another --workdir",
        lambda: transfer.prepare(
            pathlib.Path(write('{"target": "a"}', "study/prepared.json")).parent, target="b"
        ),
    ),
    (
        "the recipe could not be trained: no luck",
        lambda: transfer.Work.train(
            mock.Mock(failures={"recipe": "no luck"}, **{"runs.return_value": None})
        ),
    ),
]
ONES = jnp.ones(3)
RUN = pathlib.Path("run")
RANKS = ("test_users", "test_above", "test_tied", "test_candidates")
SIZES = {
    "num_users": 9,
    "num_target_items": 8,
    "num_source_items": 8,
    "target_interactions": 20,
    "source_interactions": 20,
}


def ints() -> np.ndarray:
    return np.ones(2, np.int32)


def demo(**fields) -> ConfigDict:
    given = {**SIZES, "seed": 0} | fields
    return changed(data=ConfigDict({"synthetic": given}))


def resumed(epoch: int):
    """A checkpoint after some epochs."""
    progress = loop.Progress(epoch=epoch).to_json()
    return mock.patch.object(Experiment, "resume", lambda experiment, checkpoints: (None, progress))


def diverged() -> None:
    experiment = mock.Mock(plan=object())
    ranker = mock.patch.multiple(
        ranking,
        rank_twice=mock.Mock(return_value=(mock.Mock(), mock.Mock())),
        summarize=mock.DEFAULT,
    )
    found = mock.patch.object(loop, "diagnose", return_value={"h": math.nan})
    row = {"epoch": 1, "train_loss": {}}
    under(ranker, found, call=lambda: loop.validate(experiment, None, row))


def end_of_epoch(entry: float) -> None:
    state = Params({"user": jnp.full((2, 2), entry)}, {})
    experiment = mock.Mock(**{"params.return_value": state})
    loop.end_epoch(experiment, state, {"step": 1, "epoch": 1}, loop.Progress(), 0.0)


def rolled_back() -> None:
    experiment = mock.Mock(config=changed(on_nonfinite="rollback"))
    progress = loop.Progress(rollbacks=loop.MAX_ROLLBACKS)
    under(
        mock.patch.object(loop, "train", side_effect=Diverged("h is nan")),
        mock.patch.object(loop, "_last", return_value=(None, progress, None)),
        call=lambda: next(loop.train_on(experiment, None, progress, mock.Mock(), None, None)),
    )


def owned(folder: str) -> None:
    with lock.owned(pathlib.Path(folder)):
        pass


def owned_twice() -> None:
    pathlib.Path("owned").mkdir()
    with lock.owned(pathlib.Path("owned")):
        owned("owned")


def together(message: str) -> None:
    def broadcast(array):
        return array

    def check() -> None:
        raise InputError(message)

    from jax.experimental import multihost_utils

    under(
        mock.patch.object(jax, "process_count", return_value=2),
        mock.patch.object(multihost_utils, "broadcast_one_to_all", broadcast),
        call=lambda: processes.together(check),
    )


def lost() -> None:
    def fail() -> None:
        with processes.watch_peers():
            raise RuntimeError("gloo: connection closed by peer")

    under(mock.patch.object(jax, "process_count", return_value=2), call=fail)


def ranks(**arrays) -> None:
    np.savez(run() / "ranks.npz", **arrays)
    read_ranks(pathlib.Path("run/ranks.npz"), "test")


def large() -> str:
    with open("large", "wb") as file:
        file.truncate((64 << 20) + 1)
    return "large"


def longer_array() -> None:
    np.save("x.npy", np.zeros(3))
    with open("x.npy", "ab") as file:
        file.write(b"more")
    files.read_array("x.npy")


def promise() -> str:
    """A header that promises 800 TB."""
    with open("x.npy", "wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**14,)}
        np.lib.format.write_array_header_1_0(file, header)
    return "x.npy"


def under_x64(stored: dict) -> None:
    stored["jax_settings"]["JAX_ENABLE_X64"] = True


def done(text: str, name: str) -> runner.Run:
    write(text, f"run/{name}")
    return full_run.plan(popular(), data(), RUN, "")


def nan_scores() -> None:
    made = recommend.load(run())
    made = made._replace(projected=jax.tree.map(lambda x: x * math.nan, made.projected))
    recommend.recommend(made, recommend.find_users(made, ["0"]), k=1)


def proximal(inner: optax.GradientTransformation, params: jax.Array | None) -> None:
    made = optimizers.proximal_l1(inner, 1.0, learning_rate=0.1)
    made.update(ONES, made.init(ONES), params)


def own_item() -> str:
    return data().target_item_ids[data().target.indices[0]]


def twice() -> None:
    """A training pair that is also a test pair."""
    recbole.save(data(), "recbole")
    line = pathlib.Path("recbole/target/target.test.inter").read_text().splitlines()[1]
    atomic_again("target/target.train.inter", line + "\n")


def atomic_again(name: str, more: str) -> None:
    with open(pathlib.Path("recbole") / name, "a") as file:
        file.write(more)
    recbole.load("recbole")


@pytest.mark.filterwarnings("ignore:the load_module")  # how ml_collections loads a config file
def test_every_error_message_is_triggered_and_says_cause_and_cure(tmp_path, monkeypatch):
    seen, wrong = set(), []
    for number, (message, call) in enumerate(MESSAGES):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        try:
            call()
        except (Exception, SystemExit) as error:
            text = error.args[0] if isinstance(error, SystemExit) else str(error)
            if re.search(message, text) is None:
                wrong.append(f"{message!r} is not in {type(error).__name__}: {text!r}")
            if not isinstance(error, KeyError) and len(text.splitlines()) != 1:
                wrong.append(f"not one line: {text!r}")
            seen |= lines_of(error)
        else:
            wrong.append(f"{message!r}: no error")
    for file, first, last, text in sites():
        reached = any((file, line) in seen for line in range(first, last + 1))
        excused = any(
            file == where.split(": ")[0] and where.split(": ", 1)[1] in text for where in UNSEEN
        )
        if reached == excused:
            wrong.append(f"{file}:{first} {'is' if reached else 'not'} triggered: {text[:90]}")
    assert not wrong, "\n".join(wrong)
