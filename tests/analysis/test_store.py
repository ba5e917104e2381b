"""Measurements on disk: whole or not at all, the same bits, and nothing lost to a full disk or a damaged file."""

from __future__ import annotations

import resource

import pytest
import torch
from hosts.onnx import small_models
from torch import nn

from attnopt.analysis.store import VARIABLE, Store, fingerprint, key_of
from attnopt.errors import OutputNotWritable
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost

HELD = {"mean": torch.randn(5, dtype=torch.float64), "rows": torch.tensor(7), "empty": torch.zeros(0, 2)}


def test_the_same_bits(tmp_path):
    store = Store.open(tmp_path / "new" / "folder")
    assert store.get("key") is None
    store.put("key", HELD)
    found = Store.open(tmp_path / "new" / "folder").get("key")
    assert list(found) == list(HELD)
    assert all(torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in HELD.items())
    store.drop("key")
    assert store.get("key") is None
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_the_folder(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    nowhere = Store.open()
    nowhere.put("key", HELD)
    assert (nowhere.folder, nowhere.get("key"), nowhere.failure) == (None, None, "")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert Store.open().folder == tmp_path
    assert Store.open(tmp_path / "other").folder == tmp_path / "other"
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputNotWritable, match="cannot be made"):
        Store.open(tmp_path / "file")


def test_a_damaged_file_is_no_measurement(tmp_path):
    store = Store.open(tmp_path)
    store.put("key", HELD)
    whole = store.path("key").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"text"):
        store.path("key").write_bytes(broken)
        assert store.get("key") is None


def test_a_full_disk_loses_nothing(tmp_path):
    """The limit on file sizes stands in for the end of the disk: writes fail in the same way."""
    store = Store.open(tmp_path)
    store.put("first", HELD)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        store.put("second", {"large": torch.zeros(10_000)})
        store.put("first", {"large": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "a measurement was not kept" in store.failure
    assert [f.name for f in tmp_path.iterdir()] == ["first.npz"]  # no half a file, under whatever name
    assert torch.equal(store.get("first")["mean"], HELD["mean"])


def test_keys_tell_everything_apart():
    assert key_of("a", "b") == key_of("a", "b") != key_of("ab")
    assert key_of("a", "b") != key_of("b", "a")


def test_fingerprints_of_models():
    def of(layer):
        return fingerprint(FxHost.from_captured(capture(layer, (torch.zeros(2, 3),), None)).graph)

    layer, other = nn.Linear(3, 4), nn.Linear(3, 4)
    assert of(layer) == of(layer)
    assert of(layer) != of(other)
    other.load_state_dict(layer.state_dict())
    assert of(layer) == of(other)
    one, same = (fingerprint(OnnxHost.from_model(small_models.spelled_out()).graph) for _ in range(2))
    assert one == same != of(layer)
