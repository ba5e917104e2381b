"""Targets load, agree with themselves, and unknown names are answered with the nearest known one."""

from __future__ import annotations

import os
import sys

import pytest

from attnopt.cost.target import all_targets, cache_sizes, load_target
from attnopt.errors import UnknownTarget


def test_the_promised_targets_are_there():
    assert [t.name for t in all_targets()] == ["a100", "b200", "cpu", "h100", "h200", "l40s", "mi300x", "rtx4090"]


@pytest.mark.parametrize("target", [t for t in all_targets() if t.kind == "gpu"], ids=lambda t: t.name)
def test_gpus_are_whole(target):
    assert target.arch
    assert min(target.units, target.bandwidth, target.memory, target.shared_memory, target.cache) > 0
    peak = target.peak
    assert peak["float32"] <= peak["float16"] == peak["bfloat16"] <= peak["int8"]
    assert 50 < peak["float16"] * 1e12 / target.bandwidth < 500  # operations per byte


def test_cpu_is_this_machine():
    target, runtime = load_target("cpu")
    assert runtime is None
    assert 1 <= target.units <= os.cpu_count()
    assert target.peak == target.efficiencies == {}  # nothing was measured, and nothing is made up
    assert target.shared_memory <= target.cache
    assert (target.cache > 0) == bool(cache_sizes())
    if sys.platform == "linux":
        assert target.memory > 2**28


def test_caches_are_read_from_the_table_of_the_kernel(tmp_path):
    entries = {"index0": ("1", "Data", "32K"), "index1": ("1", "Instruction", "64K"), "index2": ("2", "Unified", "1M")}
    entries |= {"index3": ("3", "Unified", "36608K"), "index4": ("4", "Unified", "odd")}
    for name, parts in entries.items():
        place = tmp_path / "cache" / name
        place.mkdir(parents=True)
        for part, text in zip(("level", "type", "size"), parts, strict=True):
            (place / part).write_text(text + "\n")
    assert cache_sizes(tmp_path) == {1: 32 * 2**10, 2: 2**20, 3: 36608 * 2**10}
    assert cache_sizes(tmp_path / "absent") == {}


@pytest.mark.parametrize("target", all_targets(), ids=lambda t: t.name)
def test_every_target_says_where_its_numbers_come_from(target):
    assert target.source
    assert set(target.peak) <= {"float32", "tf32", "float16", "bfloat16", "float8", "float4", "int8"}
    assert all(0 < share <= 1 for share in target.efficiencies.values())


def test_runtimes():
    assert load_target("cpu+onnxruntime")[1] == "onnxruntime"
    assert load_target("h200+torch")[0].arch == "sm_90"


@pytest.mark.parametrize(("name", "guess"), [("h20", "h200"), ("cpu+onnxrt", "cpu+onnxruntime"), ("rtx409", "rtx4090")])
def test_unknown_targets(name, guess):
    with pytest.raises(UnknownTarget) as raised:
        load_target(name)
    assert str(raised.value) == f"'{name}' is not a target. Did you mean '{guess}'? `attnopt targets` lists all."
