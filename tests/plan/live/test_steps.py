"""A plan for time takes another form of a cache where a step on a long one measures faster with it."""

from __future__ import annotations

import pytest
from live_models import host_of, tokens

from attnopt.cost.workload import parse_workload
from attnopt.hosts.eviction.coded import CodedLayer
from attnopt.hosts.eviction.stored import storage
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.layer_attention import LayerAttention
from attnopt.hosts.module.layers import NoAttention
from attnopt.plan.live import steps
from attnopt.plan.live.codes import CodesChooser
from attnopt.plan.live.converting import noted
from attnopt.plan.live.generating import Used
from attnopt.plan.live.steps import filled, long_decode, timed_on
from attnopt.plan.timing.timing import Timing


@pytest.fixture
def model():
    return shared_copy(host_of("llama").model)


def idle(model):
    return {path: LayerAttention("softmax scale(0.25) causal empty(zero)", call) for path, call in noted(model, tokens()).items()}


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ("prefill:256 decode:256@128", (1, 0)),
        ("decode:2048 decode:1024x8", (1, 2048)),
        ("prefill:4096 decode:1024x8@9", (8, 1024)),
    ],
)
def test_the_longest_cache_of_a_workload(shapes, found):
    assert long_decode(parse_workload(shapes)) == found
    assert long_decode(None) == (1, 0)


@pytest.mark.parametrize("seconds", [0.5, 0.95])
def test_both_caches_are_read_and_the_faster_one_taken(model, monkeypatch, seconds):
    asked = []

    def in_blocks(calls, **options):
        for call in calls.values():
            call()
        asked.append(sorted(calls))
        return {"plain": Timing((1.0,)), "kept": Timing((seconds,))}

    monkeypatch.setattr(steps, "in_blocks", in_blocks)
    found = timed_on(model, CodesChooser("model", idle=idle(model)), 2, 24)("int8")
    assert found == (seconds == 0.5, f"a step takes {seconds:.2f} of its time on 24 tokens")
    assert asked == [["kept", "plain"]]


def test_caches_hold_as_many_tokens_as_they_should(model):
    layers = idle(model)
    plain, codes = (filled(Used(model, codes=clause), layers, 2, 24) for clause in (None, storage("int8")))
    assert plain.get_seq_length() == codes.get_seq_length() == 24 and len(codes.layers) == 2
    assert plain.layers[1].keys.shape == (2, 2, 24, 16) and isinstance(codes.layers[1], CodedLayer)
    layers.pop("model.layers.1.self_attn")
    assert filled(Used(model), layers, 2, 24) is None
    model.model.layers[1].self_attn = NoAttention(1)
    assert filled(Used(model), layers, 2, 24).get_seq_length() == 24
