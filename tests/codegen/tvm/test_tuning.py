"""Tiles: the first of the table, or what was measured on this machine and is remembered for its family."""

from __future__ import annotations

import json
import logging

import pytest

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm import tuning
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.cpu import host, named
from attnopt.codegen.tvm.tiles import tiles
from attnopt.codegen.tvm.tuning import chosen_tile, family, keep, measured, path, tune
from attnopt.ir.spec import parse

FORM = Form(16, 16, "float32")
PLAIN = parse("softmax scale(0.25)")


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNOPT_CONFIG", str(tmp_path))
    measured.cache_clear()
    yield
    measured.cache_clear()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("softmax scale(0.25)", "dense plain"),
        ("softmax scale(0.25) load(seen, b, 0, 0, k)", "dense plain"),
        ("softmax scale(0.25) causal", "triangle plain"),
        ("softmax scale(0.25) softcap(3.0) causal & window(9)", "band scores"),
        ("softmax scale(0.25) add(load(bias, b, h, row, k)) window(3) & lookahead(3)", "band scores"),
    ],
)
def test_families(line, wanted):
    assert family(parse(line), FORM) == f"prefill {wanted} float32 16 16"


def test_the_first_of_the_table_where_nothing_was_measured():
    assert chosen_tile(PLAIN, FORM, host()) == tiles(host(), FORM)[0]


def test_what_was_measured_is_remembered():
    other = tiles(host(), FORM)[-1]
    keep(family(PLAIN, FORM), other)
    assert chosen_tile(PLAIN, FORM, host()) == other
    assert chosen_tile(parse("softmax scale(0.25) causal"), FORM, host()) == tiles(host(), FORM)[0]
    away = next(cpu for cpu in (named("haswell"), named("znver4")) if cpu != host())
    assert chosen_tile(PLAIN, FORM, away) == tiles(away, FORM)[0]
    keep("another", other)
    assert set(measured(path())) == {family(PLAIN, FORM), "another"}


def test_what_another_version_measured_is_forgotten(tmp_path):
    keep(family(PLAIN, FORM), tiles(host(), FORM)[-1])
    held = json.loads(path().read_text())
    for text in (json.dumps(held | {"tvm": "0.1"}), "{", "[]", json.dumps(held | {"tiles": {"x": {"block": 1}}})):
        path().write_text(text)
        measured.cache_clear()
        assert chosen_tile(PLAIN, FORM, host()) == tiles(host(), FORM)[0]


def test_a_folder_that_cannot_be_written_is_one_line(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNOPT_CONFIG", str(tmp_path / "file" / "config"))
    with caplog.at_level(logging.WARNING, "attnopt"):
        keep("family", tiles(host(), FORM)[0])
    assert caplog.messages == ["measured tiles are not kept: Not a directory"]


@pytest.mark.skipif(missing() is not None, reason="TVM is not installed")
def test_tiles_are_compiled_and_run(monkeypatch):
    """The faster one is kept, unless it is within noise of the first."""
    table = tiles(host(), FORM)[:2]
    monkeypatch.setattr(tuning, "tiles", lambda cpu, form: table)
    monkeypatch.setattr(tuning, "LENGTH", 64)
    monkeypatch.setattr(tuning, "SECONDS", 0.01)
    assert tune(PLAIN, FORM) in table
    ran = []

    def timed(calls):
        ran.append(list(calls))
        for call in calls.values():
            call()
        return {table[0]: 1.0, table[1]: 0.9}

    monkeypatch.setattr(tuning, "in_turn", timed)
    assert tune(PLAIN, FORM) == table[1] == chosen_tile(PLAIN, FORM, host())
    assert ran == [list(table)]
    monkeypatch.setattr(tuning, "in_turn", lambda calls: {table[0]: 1.0, table[1]: 0.98})
    assert tune(PLAIN, FORM) == table[0]
