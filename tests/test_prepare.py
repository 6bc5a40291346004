"""The prepare command as a user types it: output, exit status, bytes on disk."""

import gzip
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

from conet_jax.data import readers, store


def prepare(stdin: bytes = b"", **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "prepare.py")]
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def refused(message: str, **options) -> str:
    done = prepare(**options)
    assert done.returncode == 2, done
    assert done.stdout == "" and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    return done.stderr


@pytest.fixture
def raw(tmp_path):
    """Two files with headers: 30 users, 8 target and 6 source items each."""
    rng = np.random.default_rng(0)
    for name, items, degree in (("books.csv", 60, 8), ("movies.csv", 40, 6)):
        lines = ["user_id,item_id,rating,timestamp"]
        for user in range(30):
            for at, item in enumerate(rng.choice(items, degree, replace=False)):
                lines.append(f"{user:04},{item:05},{3 + (user + at) % 3},{at}")
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return {"target": tmp_path / "books.csv", "source": tmp_path / "movies.csv"}


def contents(folder: pathlib.Path) -> dict:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_same_input_and_seed_give_the_same_bytes(raw, tmp_path):
    options = {"candidates": 20, "twin_jaccard": 1}  # of so few users, many items look alike
    first = prepare(**raw, out=tmp_path / "one", **options)
    assert first.returncode == 0 and first.stderr == "", first.stderr
    assert prepare(**raw, out=tmp_path / "two", **options).returncode == 0
    for side in raw:  # packed and shuffled, the content is the same
        header, *lines = raw[side].read_text().splitlines()
        raw[side].write_bytes(gzip.compress("\r\n".join([header, *lines[::-1]]).encode()))
    assert prepare(**raw, out=tmp_path / "three", **options).returncode == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")
    assert prepare(**raw, out=tmp_path / "two", **options, seed=1).returncode == 0
    assert contents(tmp_path / "one") != contents(tmp_path / "two")
    data = store.load(tmp_path / "one")
    assert data.user_ids[7] == "0007" and data.target_item_ids[3].startswith("000")
    assert data.test.candidates.shape == (30, 20)


def test_options_reach_the_data_set(raw, tmp_path):
    options = {"min_rating": 3, "min_user_items": 2, "min_item_users": 2, "split": "latest"}
    options |= {"candidates": 7, "seed": 5, "drop_twins": True, "twin_jaccard": 0.6}
    options |= {"twin_users": 4}
    done = prepare(**raw, out=tmp_path / "out", **options, eval_k=6, keep_future=True)
    assert done.returncode == 0, done.stderr
    assert store.load(tmp_path / "out").meta["options"] == options
    assert prepare(**raw, out=tmp_path / "out", candidates=20).returncode == 0
    meta = store.load(tmp_path / "out").meta
    assert meta["options"]["min_rating"] == 4 and meta["audit"]["target"]["below_min_rating"] == 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "nowhere.csv"}, "nowhere.csv: no such file"),
        ({"target": ""}, "--target=FILE and --source=FILE are needed"),
        ({"download": "amazon"}, "leave out --target"),
        ({"download": "netflix"}, "download"),
        ({"out": ""}, "--out=DIR is needed"),
        ({"format": "tsv"}, "separated by tabs"),
        ({"format": "csv"}, "format"),
        ({"min_rating": "nan"}, "--min_rating=nan must be a finite number"),
        ({"min_rating": "4.5.1"}, "min_rating"),
        ({"min_rating": 6}, "no rating is 6 or more"),
        ({"min_user_items": 0}, "--min_user_items=0 must be 1 or more"),
        ({"min_item_users": -1}, "--min_item_users=-1 must be 1 or more"),
        ({"min_item_users": 31}, "core is empty"),
        ({"candidates": 0}, "--candidates=0 must be 1 or more"),
        ({"candidates": 99}, "fewer than the 99 candidates wanted: --candidates="),
        ({"candidates": 10}, "--candidates=10 must be above --eval_k=10"),
        ({"eval_k": 0}, "--eval_k=0 must be 1 or more"),
        ({"eval_k": 19}, "--candidates=19 must be above --eval_k=19"),
        ({"split": "time"}, "--split=time and --cutoff=DATE go together"),
        ({"cutoff": 3}, "--split=time and --cutoff=DATE go together"),
        ({"split": "time", "cutoff": "soon"}, "--cutoff=soon: expected a date"),
        ({"keep_future": True}, "--keep_future is for --split=latest"),
        ({"users": "some"}, "users"),
        ({"hold_out": "source"}, "hold_out"),
        ({"seed": -1}, "--seed=-1"),
        ({"split": "first"}, "split"),
        ({"twin_jaccard": 0}, "--twin_jaccard=0.0 must be above 0"),
        ({"twin_jaccard": 1.1}, "--twin_jaccard=1.1"),
        ({"twin_users": 0}, "--twin_users=0 must be 1 or more"),
        ({"min_ratings": 4}, "did you mean --min_rating?"),
    ],
)
def test_bad_input_is_one_line_and_status_2(raw, tmp_path, options, message):
    refused(message, **({**raw, "out": tmp_path / "deep" / "out", "candidates": 19} | options))
    assert sorted(os.listdir(tmp_path)) == ["books.csv", "movies.csv"]  # nothing half-written


def test_the_output_says_which_column_is_what_and_adds_up(raw, tmp_path):
    text = raw["target"].read_text().replace("rating", "Book-Rating", 1).splitlines()
    text = [f"{line};{'average_rating' if not n else 4.1}" for n, line in enumerate(text)]
    raw["target"].write_text("\n".join(line.replace(",", ";") for line in [*text, "NULL;1;5;1;4"]))
    flags = {"target_separator": "semicolon", "target_min_rating": 5, "source_time_column": "none"}
    done = prepare(**raw, out=tmp_path / "out", candidates=20, **flags)
    assert done.returncode == 0, done.stderr
    target, source, *_ = done.stdout.splitlines()
    assert target.endswith(
        "books.csv: user 'user_id', item 'item_id', rating 'Book-Rating', time 'timestamp'; "
        "left out: 'average_rating'"
    )
    assert source.endswith("rating 'rating', no time; left out: 'timestamp'")
    assert "warning: target: 'average_rating' may be feedback too, and is not read" in done.stderr
    rows = [
        line for line in done.stdout.splitlines() if re.match(r"  \w.* [\d,-]+ +[\d,-]+$", line)
    ]
    audit = {line[:45].strip(): line[45:].replace(",", "").split() for line in rows}
    assert (
        audit["left out: without an id"] == ["1", "-"] and "dropped: rating below 5 or 4" in audit
    )
    for at in (0, 1):
        read, *reasons, kept = (int(x[at].replace("-", "0")) for x in audit.values())
        assert read == kept + sum(reasons) == (241, 180)[at]
    assert store.load(tmp_path / "out").meta["reading"]["target"]["asked"] == {
        "separator": "semicolon"
    }


def test_bad_number_names_file_line_and_value(raw, tmp_path):
    raw["source"].write_text(raw["source"].read_text() + "0001,00002,four,3\n")
    refused("movies.csv:182: bad rating 'four'", **raw, out=tmp_path / "out")


def test_foreign_directory_is_refused_before_any_work(raw, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    refused("thesis.tex", **{**raw, "target": "nowhere"}, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_options_of_time_and_users_reach_the_data_set(raw, tmp_path):
    options = {"split": "latest", "hold_out": "both", "candidates": 15}
    done = prepare(**raw, out=tmp_path / "latest", **options)
    assert done.returncode == 0, done.stderr
    data = store.load(tmp_path / "latest")
    assert data.meta["options"]["keep_future"] is False and len(data.test_source.users)
    assert "not trained on" in done.stdout and "source test" in done.stdout
    options = {"split": "time", "cutoff": 5, "users": "all", "candidates": 15}
    done = prepare(**raw, out=tmp_path / "time", **options)
    assert done.returncode == 0, done.stderr
    data = store.load(tmp_path / "time")
    assert data.meta["options"]["cutoff"] == 5 and data.test_target_only is not None
    assert "trained on what comes before 5" in done.stdout
    assert "--users=shared would keep" in done.stdout


def test_twins_are_warned_of(raw, tmp_path):
    raw["source"].write_text(raw["target"].read_text())  # every item is its own twin
    done = prepare(**raw, out=tmp_path / "out", candidates=20)
    assert done.returncode == 0
    assert "warning" in done.stderr and "--drop_twins" in done.stderr
    assert "interactions on twins" in done.stdout


def test_help_lists_all_flags_quickly_and_formats_agree():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "launch" / "prepare.py"), "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    for flag in (
        *("target", "source", "out", "format", "download", "min_rating", "min_user_items"),
        *("min_item_users", "split", "candidates", "seed", "drop_twins", "twin_jaccard"),
        *("twin_users", "eval_k", "keep_future", "cutoff", "hold_out", "users"),
    ):
        assert f"--{flag}" in done.stdout or f"--[no]{flag}" in done.stdout
    assert "|".join(readers.FORMATS) in done.stdout.replace("\n", "").replace(" ", "")
    for heavy in ("polars", "numpy", "jax"):
        assert f" {heavy}\n" not in done.stderr


@pytest.mark.parametrize(
    ("folder", "target", "source", "options", "numbers", "twins"),
    [
        (
            "amazon-movies-books",
            "books.csv",
            "movies.csv",
            {"min_item_users": 3, "min_user_items": 2},
            ["5,797", "4,968", "26,881", "5,468", "45,780"],
            ["0.1%", "0.1%"],
        ),
        (
            "douban-books-music",
            "books.dat",
            "music.dat",
            {"min_item_users": 3, "min_user_items": 2, "min_rating": 4},
            ["1,271", "5,884", "54,042", "5,158", "48,600"],
            None,
        ),
        (
            "amazon-cell-electronics",
            "cell",
            "electronics",
            {"twin_jaccard": 0.9, "twin_users": 3},
            ["3,325", "18,462", "53,732", "39,463", "118,879"],
            ["7.5%", "3.4%"],
        ),
    ],
)
def test_data_at_hand_prints_the_known_figures(
    data_dir, tmp_path, folder, target, source, options, numbers, twins
):
    done = prepare(
        target=data_dir / folder / target,
        source=data_dir / folder / source,
        out=tmp_path / "out",
        **options,
    )
    assert done.returncode == 0, done.stderr
    row = next(x for x in done.stdout.splitlines() if x.startswith("this data set")).split()[3:]
    assert [row[at] for at in (0, 1, 2, 4, 5)] == numbers
    audit = {line[:45].strip(): line[45:].split() for line in done.stdout.splitlines()}
    if twins:
        assert audit["interactions on twins"] == twins
    if folder == "amazon-cell-electronics":
        assert audit["positives among the given negatives"] == ["22", "7"]
        assert "warning: 7.5%" in done.stderr
    store.load(tmp_path / "out")
