"""Measured shares become shipped ones: those that were measured, and nothing else; the file reads back as it did."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from attnopt.cost.efficiency import Efficiency, efficiencies, shipped

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import ship_efficiencies

TEXT = ship_efficiencies.SHIPPED.read_text(encoding="utf-8")
SHARES = {"products": 0.51234, "scores": 0.25, "memory": 0.5, "launch": 1.2345e-5, "ramp": 2.0, "overlap": 0.5}
MEASURED = {"description": "a processor, 1 thread", "measured": "2026-01-02", "efficiencies": {"tvm": SHARES, "new": SHARES}}


def test_what_was_measured_is_replaced_and_the_rest_stays():
    tables = tomllib.loads(ship_efficiencies.merged(TEXT, MEASURED))
    after, before = (efficiencies(some["cpu"]) for some in (tables, tomllib.loads(TEXT)))
    assert after.pop("new") == after["tvm"] == Efficiency(0.512, 0.25, 0.5, 1.23e-5, 2.0, 0.5)
    before["tvm"] = after["tvm"]
    assert after == before
    assert efficiencies(tables["gpu"]) == shipped("gpu")
    assert "a processor, 1 thread" in tables["cpu"]["tvm"]["source"] and "2026-01-02" in tables["cpu"]["tvm"]["source"]
    assert tables["cpu"]["sdpa"]["source"] == tomllib.loads(TEXT)["cpu"]["sdpa"]["source"]


def test_the_shipped_file_is_written_as_it_is_made():
    again = ship_efficiencies.merged(ship_efficiencies.merged(TEXT, MEASURED), MEASURED)
    assert again == ship_efficiencies.merged(TEXT, MEASURED)
    assert again.startswith(TEXT[: TEXT.index("\n\n")])


def test_shares_go_to_the_instructions_that_they_were_measured_with():
    held = {**MEASURED, "efficiencies": {"tvm": SHARES, "ort-linear-4bits": SHARES}}
    for features, kind in (([], "cpu"), (["vnni"], "cpu-vnni"), (["vnni", "amx"], "cpu-amx")):
        tables, before = tomllib.loads(ship_efficiencies.merged(TEXT, {**held, "features": features})), tomllib.loads(TEXT)
        assert [k for k in tables if tables[k].get("ort-linear-4bits") != before[k].get("ort-linear-4bits")] == [kind]
        assert tables[kind]["tvm"]["products"] == tables[kind]["ort-linear-4bits"]["products"] == 0.512
        assert kind == "cpu" or tables["cpu"]["tvm"] == before["cpu"]["tvm"]


@pytest.mark.parametrize("held", [{}, {"tvm": {**SHARES, "products": 1.5}}])
def test_what_is_no_measurement_is_refused(held):
    with pytest.raises(ValueError, match=r"no efficiencies|no share"):
        ship_efficiencies.merged(TEXT, {**MEASURED, "efficiencies": held})
