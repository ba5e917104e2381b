"""The predicted pace of a live model: its layers by the plan's steps, its attentions by the kernels that it holds."""

from __future__ import annotations

import pytest
from live_models import host_of
from toy_target import TOY

from attnopt.cost.estimate import estimate
from attnopt.hosts.eviction.stored import storage
from attnopt.hosts.module.changes import Change
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.interface import HELD
from attnopt.hosts.module.layer_attention import LayerAttention, OnCodes
from attnopt.patterns import recognise
from attnopt.plan.live.converting import Live
from attnopt.plan.live.foretelling import Foretold
from attnopt.plan.live.generating import Pace, spoken
from attnopt.report.plan import PlanStep

LENGTH = 48


def paces(steps=(), changes=(), **given):
    host = host_of("llama")
    found = Foretold(host, TOY, "sdpa", **given).paces(Live(host.model, tuple(changes)), steps, LENGTH)
    return found["before"], found["after"]


def step(**given):
    return PlanStep("some-pass", "site", "layer", "", "", **given)


def test_without_a_plan_both_are_the_same_and_a_prompt_takes_longer_than_a_token():
    before, after = paces()
    assert before == after and before.first > before.step > 0


def test_attentions_are_those_of_the_loads():
    """What a layer without its attention saves is that attention alone, of a prompt and of one query on a cache of its length."""
    before, after = paces(changes=[Change("no-attention", "model.layers.0.self_attn")])
    site = recognise(host_of("llama").graph).sites[0]
    shape = {"b": 1, "h": 4, "g": 2, "d": 16, "e": 16, "k": LENGTH}
    first = estimate(site.spec, {**shape, "q": LENGTH}, kernel="sdpa", target=TOY).seconds
    one = estimate("softmax", {**shape, "q": 1}, kernel="sdpa", target=TOY).seconds
    assert before.first - after.first == pytest.approx(first) and before.step - after.step == pytest.approx(one)


def test_layers_are_those_of_the_steps():
    linear = [n.name for n in host_of("llama").graph.nodes if n.op == "linear"]
    before, after = paces([step(removes=tuple(linear))])
    assert after.first < before.first and after.step < before.step


def test_a_policy_leaves_fewer_keys_and_codes_are_read_first():
    before, after = paces(keep=0.25)
    assert after.first == before.first and after.step < before.step
    before, after = paces(codes=storage("int8"))
    assert after.step > before.step


def test_keys_that_are_lifted_take_time_with_every_key():
    lifted = Change("widths", "model.layers.0.self_attn", {"keys": 8, "values": 16, "whole": 16, "turn": {}})
    before, after = paces(changes=[lifted])
    assert after.first > before.first and after.step > before.step
    assert paces(changes=[lifted], keep=0.25)[1].step < after.step


def test_codes_that_a_kernel_reads_are_not_read_first():
    host, int8 = host_of("llama"), storage("int8")
    model = shared_copy(host.model)
    for path in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
        run = OnCodes(int8, "tvm-decode", lambda q, k, v: q)
        setattr(model.get_submodule(path), HELD, LayerAttention("softmax", None, on_codes=run))
    back, kernel, other = (
        Foretold(host, TOY, "sdpa", codes=codes).paces(Live(made), (), LENGTH)["after"]
        for made, codes in ((host.model, int8), (model, int8), (model, storage("cache(k=int4, v=int4)")))
    )
    assert kernel.step < back.step and kernel.first == back.first
    assert other.step > kernel.step  # its kernel is for int8


def test_lines_of_both():
    pace = {"before": Pace(0.1, 0.01, 512.0)}
    assert spoken(pace, {"before": Pace(0.2, 0.02)}, 48) == [
        "measured on a prompt of 48: before, 100 ms to the first token, then 100 tokens a second, 512 bytes of cache a token",
        "predicted on a prompt of 48: before, 200 ms to the first token, then 50 tokens a second",
    ]
    assert spoken({}, {}, 48) == []
