"""Which kernel is taken, and what is said of the others."""

from __future__ import annotations

import pytest
import torch
from hosts.onnx import small_models
from plan_fakes import Kernel, clock

from attnopt.hosts.onnx import OnnxHost
from attnopt.patterns import recognise
from attnopt.plan.choose import applicable, apply_choices, choose, hopeless, is_fused

FUSED = small_models.attention(23, ("batch", 4, "length", 8))


def decided(monkeypatch, kernels, *, model=None, seconds=None, select="measure", asked=None):
    monkeypatch.setattr("attnopt.plan.choose.LOWERINGS", tuple(kernels))
    monkeypatch.setattr("attnopt.plan.choose.in_turn", clock(seconds or {}, asked))
    host = OnnxHost.from_model(model or small_models.spelled_out())
    sites = recognise(host.graph).sites
    chosen = choose(host, sites, host.example_inputs(), runtime="onnxruntime", opset=host.opset, select=select)
    return host, chosen


def taken(chosen):
    return chosen.lowering.name if chosen.lowering else "original"


@pytest.mark.parametrize(
    ("model", "ratio", "wanted"),
    [
        (small_models.spelled_out(), 0.5, "kernel"),
        (small_models.spelled_out(), 1.0, "kernel"),  # a tie: the kernel also saves the score matrix
        (small_models.spelled_out(), 1.02, "kernel"),
        (small_models.spelled_out(), 1.05, "original"),
        (FUSED, 0.85, "kernel"),
        (FUSED, 0.95, "original"),  # a tie within the noise: the node stays
        (FUSED, 1.0, "original"),
    ],
)
def test_measured(monkeypatch, model, ratio, wanted):
    _, (chosen,) = decided(monkeypatch, [Kernel("kernel")], model=model, seconds={"original": 2.0, "kernel": 2.0 * ratio})
    assert is_fused(chosen.site) == (model is FUSED)
    assert taken(chosen) == wanted
    assert chosen.seconds_before == 2.0
    assert chosen.seconds_after == (2.0 * ratio if wanted == "kernel" else 2.0)
    assert {c.kernel: c.taken for c in chosen.choices} == {"original": wanted == "original", "kernel": wanted == "kernel"}
    said = f"measured {1 / ratio:.2f}x the original's speed" if wanted == "kernel" else f"kernel measured {ratio:.2f} of the time"
    assert chosen.why.startswith(said)


def test_the_fastest_of_several(monkeypatch):
    kernels = [Kernel("slow"), Kernel("fast"), Kernel("refusing", reason="not today")]
    _, (chosen,) = decided(monkeypatch, kernels, seconds={"original": 1.0, "slow": 0.9, "fast": 0.5})
    assert taken(chosen) == "fast"
    assert {c.kernel: c.why for c in chosen.choices} == {
        "original": "as it was",
        "slow": "1.11x the original",
        "fast": "2.00x the original",
        "refusing": "not today",
    }


def test_a_kernel_that_fails_to_run_is_reported(monkeypatch):
    kernels = [Kernel("broken", broken="no such instruction\nat 0x0"), Kernel("sound")]
    _, (chosen,) = decided(monkeypatch, kernels, seconds={"sound": 0.5})
    assert taken(chosen) == "sound"
    failed = next(c for c in chosen.choices if c.kernel == "broken")
    assert (failed.taken, failed.why, failed.seconds) == (False, "failed to run: no such instruction", None)
    _, (chosen,) = decided(monkeypatch, kernels[:1])
    assert (taken(chosen), chosen.why) == ("original", "no kernel ran")


def test_always_takes_the_first_that_applies(monkeypatch):
    kernels = [Kernel("refusing", reason="not today"), Kernel("first"), Kernel("second"), Kernel("other", host="torch")]
    for model in (small_models.spelled_out(), FUSED):
        asked: list[list[str]] = []
        _, (chosen,) = decided(monkeypatch, kernels, model=model, select="always", asked=asked)
        assert taken(chosen) == "first"
        assert asked == []
        assert [(c.kernel, c.taken, c.why) for c in chosen.choices] == [
            ("first", True, "exact"),
            ("refusing", False, "not today"),
        ]


def test_the_model_keeps_what_is_one_kernel_already(monkeypatch):
    for model, wanted in ((small_models.spelled_out(), "kernel"), (FUSED, "original")):
        _, (chosen,) = decided(monkeypatch, [Kernel("kernel")], model=model, select="model")
        assert taken(chosen) == wanted
        assert chosen.seconds_before is None


def test_an_operator_that_the_opset_lacks(monkeypatch):
    host, (chosen,) = decided(monkeypatch, [Kernel("newer", opset=23)])
    assert (taken(chosen), chosen.why) == ("original", "needs opset 23, the model has 17")
    assert applicable(chosen.site, host, "onnxruntime", 23)[0] == [Kernel("newer", opset=23)]
    _, (chosen,) = decided(monkeypatch, [])
    assert chosen.why == "no kernel for host onnx"


def test_equal_sites_are_measured_once_and_all_replaced(monkeypatch):
    asked: list[list[str]] = []
    host, chosen = decided(monkeypatch, [Kernel("kernel")], model=small_models.two_layers(), asked=asked)
    assert asked == [["original", "kernel"]]
    assert [taken(c) for c in chosen] == ["kernel", "kernel"]
    assert len({c.site.name for c in chosen}) == 2
    result = apply_choices(host, chosen)
    assert [n.op_type for n in result.model.graph].count("MultiHeadAttention") == 2
    assert "Softmax" not in [n.op_type for n in result.model.graph]
    assert "Softmax" in [n.op_type for n in host.model.graph]
    named = {name: torch.randn(3, 4, 5, 8) for name in "qkv"}
    torch.testing.assert_close(result.runner()(named), host.runner()(named), atol=1e-5, rtol=1e-5)


def test_nothing_chosen_changes_nothing(monkeypatch):
    host, chosen = decided(monkeypatch, [Kernel("refusing", reason="not today")])
    assert chosen[0].why == "not today"
    assert apply_choices(host, chosen) is host


def test_a_kernel_far_behind_is_not_timed_again():
    assert hopeless({"local-attention": 0.1, "ort-mha": 0.9, "ort-gqa": 0.25}) == ["ort-mha"]
    assert hopeless({"local-attention": 0.001, "ort-mha": 0.1}) == []  # too short to tell from one run
    assert hopeless({}) == []
