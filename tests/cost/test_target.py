"""Targets load, agree with themselves, and unknown names are answered with the nearest known one."""

from __future__ import annotations

import pytest

from attnopt.cost.target import all_targets, load_target
from attnopt.errors import UnknownTarget


def test_the_promised_targets_are_there():
    assert [t.name for t in all_targets()] == ["a100", "b200", "cpu", "h100", "h200", "l40s", "mi300x", "rtx4090"]


@pytest.mark.parametrize("target", [t for t in all_targets() if t.kind == "gpu"], ids=lambda t: t.name)
def test_gpus_are_whole(target):
    assert target.arch
    assert target.source
    assert min(target.units, target.bandwidth, target.memory, target.shared_memory, target.cache) > 0
    peak = target.peak
    assert peak["float32"] <= peak["float16"] == peak["bfloat16"] <= peak["int8"]
    assert 50 < peak["float16"] * 1e12 / target.bandwidth < 500  # operations per byte


def test_cpu_is_this_machine():
    target, runtime = load_target("cpu")
    assert target.units >= 1
    assert runtime is None


def test_runtimes():
    assert load_target("cpu+onnxruntime")[1] == "onnxruntime"
    assert load_target("h200+torch")[0].arch == "sm_90"


@pytest.mark.parametrize(("name", "guess"), [("h20", "h200"), ("cpu+onnxrt", "cpu+onnxruntime"), ("rtx409", "rtx4090")])
def test_unknown_targets(name, guess):
    with pytest.raises(UnknownTarget) as raised:
        load_target(name)
    assert str(raised.value) == f"'{name}' is not a target. Did you mean '{guess}'? `attnopt targets` lists all."
