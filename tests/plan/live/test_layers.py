"""What a layer computes where transformers makes no mask, and when a kernel is worth leaving the model's own."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.codegen import LOWERINGS
from attnopt.codegen.library.local_sdpa import LocalSdpa
from attnopt.codegen.library.sdpa import Sdpa
from attnopt.codegen.tvm.lowerings.tvm_prefill import TvmPrefill
from attnopt.cost.target import read
from attnopt.hosts.module.layer_attention import AttentionCall, Called
from attnopt.ir.expr import render
from attnopt.ir.reference import reference
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse
from attnopt.plan.choose import Chosen, site_calls
from attnopt.plan.live import phases
from attnopt.plan.live.layers import Chooser, by_position, specs
from attnopt.plan.live.phases import DECODE, PREFILL, Shape, example, opened, site_of
from attnopt.report.data import Choice

CALL = AttentionCall(4, 2, 2, 16, 16, 0.25, None, True, None, "float32")


SMALL = Shape(4, 2, 2, 16, 16, "float32")


class AsModule(nn.Module):
    def __init__(self, kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, q, k, v):
        return self.kernel(q, k, v)[0]


def site(line: str):
    return SimpleNamespace(name="layers.0", spec=parse(line))


def test_padding_and_documents_are_left_out_of_a_mask():
    assert render(by_position(parse("softmax causal & window(6) & padding").mask)) == "causal & window(6)"
    assert by_position(parse("softmax padding").mask) is None
    assert by_position(None) is None


def test_a_prompt_has_the_mask_of_its_layer_and_one_query_none():
    prompt, query = specs(site("softmax heads(4, 2) width(16) scale(0.5) causal & window(6) & padding empty(zero)"), CALL)
    assert str(prompt) == "softmax scale(0.25) causal & window(6) empty(zero)"  # the factor of the call
    assert str(query) == "softmax scale(0.25)"


def test_a_soft_cap_is_that_of_the_call():
    prompt, _ = specs(site("softmax scale(0.25) softcap(50.0) causal"), replace(CALL, softcap=50.0))
    assert str(prompt) == "softmax scale(0.25) softcap(50.0) causal empty(zero)"


@pytest.mark.parametrize(
    ("line", "call", "why"),
    [
        ("sigmoid scale(0.25) causal", CALL, "own attention"),
        ("softmax scale(0.25) add(-0.5 * (q - k)) causal", CALL, "bias"),
        ("softmax scale(0.25)", CALL, "do not agree"),
        ("softmax scale(0.25) causal", replace(CALL, others=("s_aux",)), "s_aux"),
    ],
)
def test_what_a_kernel_of_ours_does_not_know_is_refused(line, call, why):
    found = specs(site(line), call)
    assert isinstance(found, Refusal) and why in found.reason and found.node == "layers.0"


OWN = "softmax heads(4, 2) width(16) scale(0.25) causal & padding"


@pytest.mark.parametrize(
    ("planned", "prompt", "query"),
    [
        (
            f"{OWN} & (window(3) | global(1))",
            "softmax scale(0.25) causal & (window(3) | global(1)) empty(zero)",
            "softmax offset(size(k) - size(q)) scale(0.25) causal & (window(3) | global(1)) empty(zero)",
        ),
        (f"{OWN} block_topk(4, 2)", "softmax scale(0.25) causal empty(zero) block_topk(4, 2)", "softmax scale(0.25)"),
        (
            f"{OWN} precision(q=int8, k=int8)",
            "softmax scale(0.25) causal empty(zero) precision(q=int8, k=int8)",
            "softmax scale(0.25)",
        ),
        (
            f"{OWN} & window(3) delta(4, dense=causal & padding)",
            "softmax scale(0.25) causal & window(3) empty(zero) delta(4, dense=causal)",
            "softmax scale(0.25)",
        ),
    ],
)
def test_a_plan_narrows_both_phases_and_gives_the_rest_to_prompts(planned, prompt, query):
    """A correction makes up for what a prompt leaves out; a query behind it sees all."""
    assert tuple(map(str, specs(site(OWN), CALL, parse(planned)))) == (prompt, query)


def test_a_mask_that_reads_a_tensor_of_its_own_is_refused():
    found = specs(site(OWN), CALL, parse(f"{OWN} & load(table, h, k) > 0"))
    assert isinstance(found, Refusal) and "'table'" in found.reason


@pytest.mark.parametrize(("seconds", "own_sdpa", "taken"), [(0.8, True, True), (0.95, True, False), (0.95, False, True)])
def test_the_models_own_sdpa_is_left_for_a_clear_gain_only(seconds, own_sdpa, taken):
    choices = (Choice("tvm-prefill", True, "", seconds), Choice("sdpa", False, "", 1.0))
    chooser = Chooser("measure", read("cpu"), own_sdpa=own_sdpa)
    found = chooser.worth_it(Chosen(site("softmax"), TvmPrefill(), "", choices))
    assert (found.lowering is not None) == taken


def test_sdpa_itself_is_the_models_own():
    found = Chooser("measure", read("cpu"), own_sdpa=True).worth_it(
        Chosen(site("softmax"), Sdpa(), "", (Choice("sdpa", True, "", 1.0),))
    )
    assert found.lowering is None


def test_kernels_are_timed_on_what_the_layer_computes_and_not_on_what_stands_in_its_place():
    shape = Shape(2, 1, 1, 16, 16, "float32")
    inputs = example(PREFILL, shape, length=24)
    asked = site_of(opened(PREFILL, shape), parse("softmax scale(0.5) causal & window(6) empty(zero)"))
    calls, failed = site_calls(opened(PREFILL, shape), asked, [Sdpa(), LocalSdpa()], inputs)
    wanted = reference(str(asked.spec), *inputs.values())
    assert not failed
    for name in ("sdpa", "local-sdpa"):
        torch.testing.assert_close(calls[name]()[0], wanted, atol=1e-5, rtol=1e-5)


def test_a_kernel_is_called_without_its_graph_where_nobody_watches():
    made = phases.kernel(DECODE, SMALL, parse("softmax scale(0.25)"), next(x for x in LOWERINGS if x.name == "tvm-decode"))
    assert isinstance(made, Called)
    given = example(DECODE, SMALL)
    q, k, v = given["q"], given["k"], given["v"]
    watched = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            watched.append(func)
            return func(*args, **(kwargs or {}))

    plain = made(q, k, v)[0]
    with Watch():
        seen = made(q, k, v)[0]
    assert torch.ops.attnopt.tvm_decode.default in watched
    assert torch.equal(plain, seen)
    assert torch.equal(plain, made.graph(q, k, v)[0])
    traced = torch.export.export(AsModule(made), (q, k, v))
    assert any(n.target is torch.ops.attnopt.tvm_decode.default for n in traced.graph.nodes)


def test_a_graph_of_several_operators_is_run_as_it_is():
    found = phases.opened(DECODE, SMALL)
    assert phases.called(found.module) is None
