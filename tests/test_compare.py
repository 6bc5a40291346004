"""Finished runs side by side, against their files read by hand; event files read back."""

import json
import shutil
import struct
import sys

import numpy as np
import pytest
from helpers import SMALL, assert_one_line_error, launch, tiny
from scipy import stats

from conet_jax import metrics
from conet_jax.data import synthetic
from conet_jax.errors import InputError
from conet_jax.run.fit import fit
from conet_jax.studies import compare


def config_of(variant, **fields):
    return tiny(variant, layers=(8, 4), **{"epochs": 2} | fields)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Popularity, and iALS with two seeds: no gradients, so nothing much to compile."""
    folder = tmp_path_factory.mktemp("runs")
    data = synthetic.dataset(**SMALL)[0]
    for name, config in (
        ("popularity", config_of("popularity")),
        ("ials/seed_0", config_of("ials", ials_alpha=2.0)),
        ("ials/seed_1", config_of("ials", ials_alpha=2.0, seed=1)),
    ):
        fit(config, folder / name, dataset=data, quiet=True)
    return folder


def workdirs(runs):
    return [runs / "popularity", runs / "ials" / "seed_0", runs / "ials" / "seed_1"]


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_table_is_the_differing_fields_and_metrics_of_the_files(runs):
    lines = compare.report(workdirs(runs)).splitlines()  # of warm test items by default
    assert lines[0].startswith("3 runs on data ") and "test_warm split, " in lines[0]
    head = cells(lines[2])
    rows = [dict(zip(head[1:], cells(line)[1:], strict=True)) for line in lines[4:6]]
    assert [row["run"] for row in rows] == [str(runs / "popularity"), f"{runs / 'ials'} (2)"]
    assert {"model", "ials_alpha"} <= set(head)
    assert not {"seed", "variant", "name", "learning_rate", "l1"} & set(head)
    assert rows[1]["model"] == "ials" and rows[1]["ials_alpha"] == "2.0"
    assert [row["seeds"] for row in rows] == ["0", "0, 1"]
    results = [json.loads((w / "result.json").read_text()) for w in workdirs(runs)]
    for name in ("hit_ratio@10", "ndcg@10", "mrr@10"):
        assert rows[0][name] == f"{results[0]['test_warm'][name]:.4f}"
        values = [result["test_warm"][name] for result in results[1:]]
        assert rows[1][name] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    assert rows[0]["parameters"] == f"{results[0]['parameters']:,}"


@pytest.mark.parametrize(("split", "k"), [("test", 10), ("valid", 5), ("test_warm", 10)])
def test_test_is_scipy_s_over_users_averaged_over_seeds(runs, split, k):
    lines = compare.report(workdirs(runs), split=split, k=k).splitlines()
    ndcg = []
    for workdir in workdirs(runs):
        with np.load(workdir / "ranks.npz") as ranks:
            arrays = ranks[f"{split}_above"], ranks[f"{split}_tied"]
            ndcg.append(metrics.ndcg(*arrays, k=k))
    ours, base = (ndcg[1] + ndcg[2]) / 2, ndcg[0]
    p = stats.ttest_rel(ours, base).pvalue
    row = cells(lines[9])
    assert row[0] == "2" and row[1] == f"{100 * (ours.mean() / base.mean() - 1):+.2f}%"
    assert row[2] == ("<0.0001" if p < 1e-4 else f"{p:.4f}")
    assert row[3].startswith(f"{(ours - base).mean():+.4f} [")


def test_runs_on_other_data_are_refused(runs, tmp_path):
    other = synthetic.dataset(**SMALL | {"seed": 1})[0]
    fit(config_of("popularity"), tmp_path / "other", dataset=other, quiet=True)
    done = launch("compare", runs / "popularity", tmp_path / "other")
    assert_one_line_error(done, "other data", other.meta["hash"][:12])


def test_launcher_prints_the_report_and_takes_flags_between(runs):
    done = launch("compare", runs / "popularity", "--k=5", runs / "ials" / "seed_0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == compare.report(workdirs(runs)[:2], k=5)


def test_what_is_no_finished_run_is_an_error_with_the_command(runs, tmp_path):
    with pytest.raises(InputError, match="launch/train.py"):
        compare.report([tmp_path])
    (tmp_path / "config.json").write_text((runs / "popularity" / "config.json").read_text())
    with pytest.raises(InputError, match="no result yet; go on with it: python launch/train.py"):
        compare.report([tmp_path])
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read as a finished run"):
        compare.report([tmp_path])
    assert_one_line_error(launch("compare"), "python launch/compare.py runs/a runs/b")


def test_runs_that_differ_in_later_cuts_alone_are_seeds_of_one_row(runs, tmp_path):
    first, second = (shutil.copytree(path, tmp_path / path.name) for path in workdirs(runs)[1:3])
    path = second / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eval_k": 10}))  # as it once was
    report = compare.report([first, second])
    assert report == compare.report(workdirs(runs)[1:3]).replace(str(runs / "ials"), str(tmp_path))
    assert "ndcg@10" in report and "eval_k" not in report and "ndcg@5" not in report
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eval_k": [5, 10]}))
    assert "| eval_k |" in compare.report([first, second])


def test_the_same_run_twice_is_refused(runs):
    with pytest.raises(InputError, match="one config twice with the same seed"):
        compare.report([runs / "popularity", runs / "popularity"])


def records(path):
    """Records of an event file: length u64, its checksum u32, content, its checksum u32."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield content[12 : 12 + length]
        content = content[16 + length :]


def test_event_files_hold_the_numbers_of_metrics_jsonl(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    data = synthetic.dataset(**SMALL)[0]
    fit(config_of("ials", epochs=1), tmp_path, dataset=data, quiet=True, tensorboard=True)
    fit(config_of("ials"), tmp_path, dataset=data, quiet=True, tensorboard=True)
    found = {}
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        for record in records(path):
            event = Event.FromString(record)
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert found["valid/ndcg_10", row["epoch"]] == pytest.approx(row["valid"]["ndcg@10"])
        assert found["seconds/total", row["epoch"]] == pytest.approx(row["seconds"]["total"])
    assert len(found) == 2 * sum(len(x) if isinstance(x, dict) else 1 for x in rows[0].values()) - 2


def test_missing_tensorboardx_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match=r'pip install "conet-jax\[tensorboard\]"'):
        fit(config_of("popularity"), tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
