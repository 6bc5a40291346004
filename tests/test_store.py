"""Prepared data comes back as it was written; anything else is refused with a reason."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from conet_jax.data import store
from conet_jax.data.assemble import from_arrays
from conet_jax.data.types import Dataset, content_hash
from conet_jax.errors import InputError


@pytest.fixture(scope="module")
def data() -> Dataset:
    rng = np.random.default_rng(0)
    pairs = [np.nonzero(rng.random((20, size)) < 0.4) for size in (30, 15)]
    made = from_arrays(*pairs[0], *pairs[1], candidates=5)
    ids = made.user_ids.copy()
    ids[:6] = ["", "007", "é\n日本", "a" * 300, "nul\0", "\udcff"]
    made = made._replace(user_ids=ids)
    return made._replace(meta=made.meta | {"hash": content_hash(made)})


@pytest.fixture
def saved(data, tmp_path):
    store.save(data, tmp_path / "prepared")
    return tmp_path / "prepared"


def test_everything_comes_back(data, saved):
    back = store.load(saved)
    assert back.meta == data.meta
    for name in ("user_ids", "target_item_ids", "source_item_ids"):
        assert getattr(back, name).tolist() == getattr(data, name).tolist()
    for part in ("target", "source", "valid", "test"):
        for one, two in zip(getattr(back, part), getattr(data, part), strict=True):
            np.testing.assert_array_equal(one, two)
            assert np.asarray(one).dtype == np.asarray(two).dtype
    assert os.listdir(saved.parent) == ["prepared"]


def test_arrays_can_be_mapped_and_hold_no_pickle(saved):
    for file in saved.glob("*.npy"):
        if os.path.getsize(file) > 128:
            assert isinstance(np.load(file, mmap_mode="r", allow_pickle=False), np.memmap)
    meta = json.loads((saved / "dataset.json").read_text())
    assert {"counts", "audit", "options", "hash"} <= set(meta)


def test_same_data_gives_same_bytes(data, saved):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    store.save(data, saved)  # a prepared directory may be replaced
    assert before == {file.name: file.read_bytes() for file in saved.iterdir()}
    assert os.listdir(saved.parent) == ["prepared"]


def test_saving_replaces_damaged_data_too(data, saved):
    (saved / "dataset.json").write_text("{")
    store.save(data, saved)
    store.load(saved)


def test_what_is_not_prepared_data_is_not_replaced(data, saved, tmp_path):
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds notes.txt"):
        store.save(data, saved)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not a directory"):
        store.save(data, tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        store.save(data, tmp_path / "file" / "below")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "dataset.json").write_text("{}")
    with pytest.raises(InputError, match="not a prepared data set"):
        store.save(data, tmp_path / "other")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "other", "prepared"]


def test_parents_are_made_and_links_followed(data, tmp_path):
    store.save(data, tmp_path / "a" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    store.save(data, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    store.load(tmp_path / "link")


def test_failed_write_leaves_the_old_data(data, saved, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", broken)
    with pytest.raises(InputError, match="No space left"):
        store.save(data, saved)
    assert os.listdir(saved.parent) == ["prepared"]
    store.load(saved)


def test_failed_renaming_puts_the_old_data_back(data, saved, monkeypatch):
    rename = pathlib.Path.rename

    def broken(path, target):
        if ".new-" in path.name:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", broken)
    with pytest.raises(InputError, match="Input/output error"):
        store.save(data, saved)
    assert os.listdir(saved.parent) == ["prepared"]
    store.load(saved)


def edit(folder, name: str, change) -> None:
    path = folder / f"{name}.npy"
    np.save(path, change(np.load(path)))


def put(at, value):
    def change(array):
        array[at] = value
        return array

    return change


EDITS = [
    ("target_indices", put(0, 99), "target: an item index out of range 0 .. 29"),
    ("target_indices", put(0, -1), "target: an item index out of range"),
    ("target_indices", lambda a: a[:-1], "target: row pointers"),
    ("target_indptr", lambda a: a[:-1], "target: arrays of the wrong shape"),
    ("target_indptr", put(1, 10**6), "target: row pointers"),
    ("source_indices", lambda a: a[::-1].copy(), "source: items of a user that are not strictly"),
    ("source_indices", lambda a: a.astype(np.int64), "source_indices.npy: not an array of type"),
    ("source_indices", lambda a: a.astype(object), "source_indices.npy: cannot be read"),
    ("test_users", lambda a: a[::-1].copy(), "test: pairs that are not strictly increasing"),
    ("test_users", put(-1, 20), "test: a user index out of range 0 .. 19"),
    ("test_items", put(0, 30), "test: a item index out of range 0 .. 29"),
    ("valid_candidates", put((0, 0), -5), "valid: a candidate index out of range"),
    ("valid_candidates", lambda a: a[:, :-1], "valid: a mask of another shape"),
    ("valid_items", lambda a: a[1:], "valid: arrays whose shapes do not agree"),
    ("valid_mask", put((0, 0), False), "does not match its hash"),
    ("test_items", lambda a: (a + 1) % 30, "does not match its hash"),
    ("user_ids_bytes", lambda a: a[:-1], "user_ids: offsets that do not"),
    ("user_ids_bytes", put(0, 0xFF), "user_ids: .*can't decode"),
    ("user_ids_offsets", lambda a: a[:-1], "user_ids: ids for 20 rows expected"),
    ("user_ids_offsets", put(3, 0), "user_ids: offsets that do not"),
]


@pytest.mark.parametrize(("name", "change", "message"), EDITS)
def test_altered_array_is_found(saved, name, change, message):
    edit(saved, name, change)
    with pytest.raises(InputError, match=f"{message}.*run prepare again"):
        store.load(saved)


@pytest.mark.parametrize("size", [0, 5, 20, 100, 129, -4])
def test_truncated_array_is_found(saved, size):
    path = saved / "target_indices.npy"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="target_indices.npy: cannot be read.*run prepare again"):
        store.load(saved)


def test_header_that_promises_too_much_is_found(saved):
    path = saved / "target_indices.npy"
    raw = path.read_bytes()
    start, end = raw.index(b"'shape': (") + 10, raw.index(b",)")
    path.write_bytes(raw[:start] + b"9" * 14 + raw[end:].replace(b" " * 12, b"", 1))
    with pytest.raises(InputError, match="target_indices.npy: cannot be read"):
        store.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:40], "dataset.json: not readable"),
        (lambda text: "[]", "dataset.json: not readable"),
        (lambda text: text.replace('"users": 20', '"users": 21'), "wrong shape"),
        (lambda text: text.replace('"users": 20', '"users": "20"'), "dataset.json: not readable"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "does not match its hash"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format 2 where 1 is expected"),
    ],
)
def test_altered_description_is_found(saved, change, message):
    text = (saved / "dataset.json").read_text()
    assert change(text) != text
    (saved / "dataset.json").write_text(change(text))
    with pytest.raises(InputError, match=f"{message}.*run prepare again"):
        store.load(saved)


def test_missing_data_says_to_prepare(saved, tmp_path):
    with pytest.raises(InputError, match="nowhere: no prepared data here.*run prepare"):
        store.load(tmp_path / "nowhere")
    (saved / "test_mask.npy").unlink()
    with pytest.raises(InputError, match="test_mask.npy: the file is missing.*run prepare again"):
        store.load(saved)
    shutil.rmtree(saved)
