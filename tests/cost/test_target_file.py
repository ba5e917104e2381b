"""The file of a measured machine: where it lies, that it reads back, and that it is whole or not there."""

from __future__ import annotations

import os
import tomllib
from dataclasses import replace

import pytest
import torch

from attnopt.cost.efficiency import Efficiency
from attnopt.cost.target import all_targets, load_target
from attnopt.cost.target_file import as_toml, config_folder, measured_path, processor, save, target_data
from attnopt.errors import OutputNotWritable, UnreadableTarget

MEASURED = replace(
    load_target("cpu")[0], description='a "quoted" \\ name', peak={"float32": 0.125, "int8": 0.5}, bandwidth=2.5e10, launch=1e-6,
    levels=((1e6, 9e10), (1e8, 2.5e10)), efficiencies={"sdpa": Efficiency(0.7, 0.1, 0.5, 1e-5, 3.0, 0.1)}, measured="2026-01-02", units=2,
)  # fmt: skip


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNOPT_CONFIG", str(tmp_path / "mine"))
    assert config_folder() == tmp_path / "mine"
    assert measured_path().parent == tmp_path / "mine"
    monkeypatch.delenv("ATTNOPT_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config_folder() == tmp_path / "attnopt"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.delenv("APPDATA", raising=False)
    assert config_folder().parts[-2:] == (".config", "attnopt")


def test_its_name_is_the_processor_and_its_threads(monkeypatch, tmp_path):
    table = tmp_path / "cpuinfo"
    table.write_text("processor : 0\nmodel name\t: Fast(R) CPU @ 3.10GHz\nmodel name : other\n")
    assert processor(table) == "Fast(R) CPU @ 3.10GHz"
    assert processor(tmp_path / "absent")
    monkeypatch.setattr("attnopt.cost.target_file.processor", lambda: "Fast(R) CPU @ 3.10GHz")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert measured_path(tmp_path).name == "cpu-fast-r-cpu-3-10ghz-4-threads.toml"


def test_it_reads_back_and_goes_before_what_is_shipped(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNOPT_CONFIG", str(tmp_path / "deep" / "folder"))
    assert load_target("cpu")[0].measured == ""
    path = save(MEASURED)
    assert path == measured_path()
    assert load_target("cpu")[0] == MEASURED
    assert [t.measured for t in all_targets() if t.measured] == ["2026-01-02"]
    assert list(path.parent.iterdir()) == [path]
    assert "memory" not in target_data(MEASURED)  # the system tells it anew


def test_a_file_that_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNOPT_CONFIG", str(tmp_path))
    for text in ("not toml", "kind = 'cpu'\nno_such_field = 1\n", "[efficiencies.sdpa]\nproducts = 7.0\n"):
        measured_path().write_text(text)
        with pytest.raises(UnreadableTarget, match="Delete it, or run `attnopt calibrate` again"):
            load_target("cpu")
    assert load_target("h200")[0].name == "h200"


def test_nothing_half_written(monkeypatch, tmp_path):
    before = save(MEASURED, tmp_path).read_text()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(replace(MEASURED, bandwidth=1.0), tmp_path)
    assert [p.read_text() for p in tmp_path.iterdir()] == [before]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputNotWritable, match="Set ATTNOPT_CONFIG to another folder"):
        save(MEASURED, tmp_path / "file")


def test_toml_of_nested_tables():
    data = {"a": 1, "b": True, "c": [[1.0, 2.5]], "d": {"e": {"f": 'x"y'}, "g": {"h": 2}}}
    assert tomllib.loads(as_toml(data)) == data
