"""Shares: what is shipped, and what is no share."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnopt.cost.efficiency import BYTES, PLAIN, Efficiency, efficiencies, shipped
from attnopt.cost.target import load_target


@pytest.mark.parametrize("kind", ["cpu", "gpu", "cpu-vnni", "cpu-amx"])
def test_what_is_shipped_is_whole_and_says_its_source(kind):
    import tomllib
    from importlib import resources

    tables = tomllib.loads((resources.files("attnopt.cost") / "efficiencies.toml").read_text(encoding="utf-8"))[kind]
    assert shipped(kind).keys() == tables.keys() >= (set(BYTES) if "-" in kind else {PLAIN})
    assert all(table["source"] for table in tables.values())


@pytest.mark.parametrize("wrong", [{"products": 0.0}, {"memory": 1.5}, {"scores": -1.0}, {"launch": -1.0}, {"overlap": 2.0}])
def test_what_is_no_share(wrong):
    with pytest.raises(ValueError, match=r"share|negative"):
        Efficiency(**wrong)


def test_tables_become_families():
    assert efficiencies({"sdpa": {"products": 0.5, "source": "a table"}, "note": "text"}) == {"sdpa": Efficiency(products=0.5)}


def test_layers_of_bytes_have_the_shares_of_the_newest_instructions():
    cpu = replace(load_target("cpu")[0], features=())
    vnni, amx = replace(cpu, features=("vnni",)), replace(cpu, features=("vnni", "amx"))
    for family in BYTES:
        held = [t.efficiency(family) for t in (cpu, vnni, amx)]
        assert held == [shipped(kind)[family] for kind in ("cpu", "cpu-vnni", "cpu-amx")]
    assert cpu.efficiency("sdpa") == amx.efficiency("sdpa")
    assert shipped("cpu-none") == {}


def test_an_unknown_family_is_plain():
    target = load_target("h200")[0]
    assert target.efficiency("no-such") == shipped("gpu")[PLAIN] != target.efficiency("sdpa")
