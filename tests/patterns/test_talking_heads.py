"""A mix across heads is part of the attention, in every spelling and host; where it would let hidden keys through it is refused."""

from __future__ import annotations

import io
import itertools
import random

import onnx
import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.cost import cost
from attnopt.ir.reference import reference
from attnopt.ir.spec import parse
from attnopt.patterns import recognise

HEADS, WIDTH = 4, 8
SHAPES = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
SPELLINGS = ("layer", "layer without bias", "convolution", "first", "last", "product")


class Talking(nn.Module):
    """before, after: how scores and weights are mixed, "" for not at all. mask: "" or where it stands. scale: where."""

    def __init__(self, **how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(HEADS, HEADS) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(HEADS, 1, 1))
        self.how = {"before": "", "after": "", "mask": "", "scale": "scores", "wrong": "", **how}

    def mixed(self, x: Tensor, which: int) -> Tensor:
        how, layer = self.how["after" if which else "before"], self.layers[which]
        if how == "layer":
            return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if how == "layer without bias":
            return nn.functional.linear(x.permute(0, 2, 3, 1), layer.weight).movedim(-1, 1)
        if how == "convolution":
            return nn.functional.conv2d(x, layer.weight[:, :, None, None])
        if how == "first":
            return torch.einsum("hg,bgqk->bhqk", layer.weight, x)
        if how == "last":
            return torch.einsum("bgqk,hg->bhqk", x, layer.weight)
        if how == "product":
            return (x.permute(0, 2, 3, 1) @ layer.weight.T).permute(0, 3, 1, 2)
        return x

    def masked(self, x: Tensor) -> Tensor:
        seen = torch.ones(x.shape[2], x.shape[3], dtype=torch.bool).tril()
        return x.masked_fill(~seen, -torch.inf)

    def operands(self, x: Tensor) -> list[Tensor]:
        return [layer(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for layer in (self.q, self.k, self.v)]

    def forward(self, x: Tensor) -> Tensor:
        how, (q, k, v) = self.how, self.operands(x)
        q = q * 0.25 if how["scale"] == "query" else q
        scores = q @ k.mT
        scores = scores * 0.25 if how["scale"] == "scores" else scores
        if how["mask"] == "before":
            scores = self.masked(scores)
        if how["wrong"] == "bias":
            scores = scores + self.bias * torch.arange(x.shape[1])
        scores = self.mixed(scores, 0)
        if how["scale"] == "late":
            scores = scores * 0.25
        if how["mask"] == "after":
            scores = self.masked(scores)
        if how["mask"] == "heads":
            scores = scores.masked_fill((torch.arange(HEADS) > 1)[:, None, None] & (torch.arange(x.shape[1]) > 2), -torch.inf)
        p = self.mixed(scores.softmax(-1), 1)
        if how["wrong"] == "factor":
            p = p * x[:, None, :, :1]
        return (p @ v).transpose(1, 2).flatten(2)


def example(batch: int = 2, length: int = 6) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, length, HEADS * WIDTH)


def found(model: nn.Module):
    return recognise(FxHost.from_captured(capture(model.eval(), {"x": example()}, dynamic_shapes=SHAPES)).graph)


def exported(model: nn.Module) -> onnx.ModelProto:
    written = io.BytesIO()
    torch.onnx.export(model.eval(), (example(),), written, dynamic_shapes=SHAPES, dynamo=True, verbose=False)
    return onnx.load_from_string(written.getvalue())


def line(before: str, after: str, mask: str = "", scale: str = "scores") -> str:
    terms = ["mix(mix0)" if before else "", "add(load(bias0, h))" if before == "layer" else ""]
    terms = [*terms, "scale(0.25)"] if scale == "late" and before else ["scale(0.25)", *terms]
    seen = "causal empty(zero)" if mask else ""
    bias = ", bias=weight_mix0_bias" if after == "layer" else ""
    late = f"weight_mix(weight_mix0{bias})" if after else ""
    return " ".join(part for part in (f"softmax heads({HEADS}) width({WIDTH})", *terms, seen, late) if part)


def drawn(seed: int) -> dict[str, str]:
    source = random.Random(seed)
    before, after = source.choice([pair for pair in itertools.product(("", *SPELLINGS), repeat=2) if any(pair)])
    mask = source.choice(["", "after"]) if after != "layer" else ""
    return {"before": before, "after": after, "mask": mask, "scale": source.choice(["scores", "query", "late"])}


@pytest.mark.parametrize("seed", range(8))
def test_random_spellings(seed):
    how = drawn(seed)
    answer = found(Talking(**how))
    assert not answer.refusals, (how, answer.refusals)
    (site,) = answer.sites
    assert str(site.spec) == line(**how), how
    assert parse(str(site.spec)) == site.spec


@pytest.mark.parametrize(
    ("before", "after", "mask"), [("layer", "layer", ""), ("product", "convolution", "after"), ("", "last", "after")]
)
def test_the_spec_says_what_the_model_computes(before, after, mask):
    model, x = Talking(before=before, after=after, mask=mask).eval(), example()
    (site,) = found(model).sites
    first, second = model.layers
    given = {"mix0": first.weight, "bias0": first.bias, "weight_mix0": second.weight, "weight_mix0_bias": second.bias}
    out = reference(site.spec, *model.operands(x), **{name: given[name] for name in site.spec.operands})
    torch.testing.assert_close(model(x), out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("seed", range(2))
def test_the_exact_rewrite_computes_the_same(seed):
    model = Talking(**drawn(seed + 20)).eval()
    fast = attnopt.optimize(model, {"x": example()}, dynamic_shapes=SHAPES, select="always")
    assert [s.kernel for s in fast.report.sites] == ["head-mixing"]
    for x in (example(), example(3, 11)):
        torch.testing.assert_close(fast(x=x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{"before": "layer", "after": "layer"}, {"before": "first", "after": "product", "mask": "after"}])
def test_in_onnx(how):
    proto = exported(Talking(**how))
    (site,) = recognise(OnnxHost.from_model(proto).graph).sites
    assert str(site.spec) == line(**how)
    fast = attnopt.optimize(proto, {"x": example().numpy()}, select="always")
    assert [s.kernel for s in fast.report.sites] == ["onnx-head-mixing"]
    assert fast.report.difference.max_rel < 1e-5


def test_a_mix_costs_a_product_over_the_heads_for_each_score():
    shape = {"b": 2, "h": 4, "g": 4, "q": 64, "k": 64, "d": 8, "e": 8}
    plain, both = (cost(f"softmax scale(0.25){mix}", shape).flops for mix in ("", " mix(m) weight_mix(w)"))
    assert both - plain == 2 * 4 * 64 * 64 * (2 * 2 * 4 + 2)  # a multiply-add for each head, twice; and the term itself


NEAR_MISSES = {
    "a mask before the mix": ({"before": "first", "mask": "before"}, "scores are hidden before they are mixed across heads"),
    "a mask of each head": ({"before": "first", "mask": "heads"}, "heads that are mixed hide different keys"),
    "a bias on hidden keys": ({"after": "layer", "mask": "after"}, "what is added to mixed weights reaches hidden keys"),
    "a bias before a mask": ({"before": "first", "mask": "after", "wrong": "bias"}, "a bias that may hide keys is added before"),
    "a factor after the mix": ({"after": "first", "wrong": "factor"}, "the weights enter 'mul'"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    how, reason = NEAR_MISSES[name]
    answer = found(Talking(**how))
    assert not answer.sites
    (refusal,) = answer.refusals
    assert refusal.reason.startswith(reason)
    assert refusal.remedy


@pytest.mark.parametrize(
    ("what", "reason"), [("keys", "the weights enter 'linear'"), ("batch", "mixes another dimension than the heads")]
)
def test_a_layer_over_keys_or_batch_is_no_mix_of_heads(what, reason):
    class Other(Talking):
        def mixed(self, x: Tensor, which: int) -> Tensor:
            if not which:
                return x
            return nn.functional.linear(x, self.over) if what == "keys" else torch.einsum("cb,bhqk->chqk", self.over, x)

    model = Other().eval()
    model.over = nn.Parameter(torch.rand(*((6, 6) if what == "keys" else (2, 2))))
    answer = recognise(FxHost.from_captured(capture(model, {"x": example()}, dynamic_shapes={"x": None})).graph)
    assert not answer.sites
    (refusal,) = answer.refusals
    assert reason in refusal.reason
