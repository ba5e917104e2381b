"""Two softmaxes, or two parts of one, that are subtracted are one attention, in both hosts; near misses stay apart or say why."""

from __future__ import annotations

import io

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


class Differential(nn.Module):
    """`of`: weights or outputs are subtracted. factor: constant, tensor (a learned scalar from an input), head, or row."""

    def __init__(self, **how: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = HEADS * WIDTH
        self.q1, self.k1, self.q2, self.k2, self.v, self.w = (nn.Linear(width, width) for _ in range(6))
        self.o = nn.Linear(width, width)
        self.head = nn.Parameter(torch.rand(HEADS, 1, 1))
        self.how = {
            "of": "weights",
            "factor": "head",
            "scale": 1.0,
            "values": "one",
            "mask": "one",
            "attention": "eager",
            "first": 0.0,
            **how,
        }

    def operands(self, x: Tensor) -> list[Tensor]:
        layers = (self.q1, self.k1, self.q2, self.k2, self.v, self.w)
        return [layer(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for layer in layers]

    def factor(self, x: Tensor) -> Tensor | float:
        kinds = {
            "constant": 0.75,
            "head": self.head,
            "row": x[:, None, :, :1].sigmoid(),
            "keys": x[:, None, None, :, 0].sigmoid(),
        }
        return kinds[self.how["factor"]]

    def forward(self, x: Tensor) -> Tensor:
        how, length = self.how, x.shape[1]
        q1, k1, q2, k2, v, w = self.operands(x)
        future = torch.full((length, length), -torch.inf).triu(1)
        if how["attention"] == "sdpa":
            a, b = (
                nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25) for q, k in ((q1, k1), (q2, k2))
            )
            out = a - self.factor(x) * b
        else:
            first = (q1 @ k1.mT * 0.25 + future).softmax(-1)
            second = q2 @ k2.mT * (0.25 * how["scale"])
            second = (second + future if how["mask"] == "one" else second).softmax(-1)
            if how["of"] == "weights":
                first = first * how["first"] if how["first"] else first
                out = (first - self.factor(x) * second) @ v
            else:
                out = first @ v * how["first"] if how["first"] else first @ v
                out = out - self.factor(x) * (second @ (v if how["values"] == "one" else w))
        return self.o(out.transpose(1, 2).flatten(2))


def example(batch: int = 2, length: int = 6) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, length, HEADS * WIDTH)


SHAPES = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
SHARES = {"constant": "-0.75", "head": "-load(factor0, h, 0, 0)", "row": "-load(factor0, b, 0, row, 0)"}


def line(factor: str, gate: str = "") -> str:
    inner = "softmax scale(0.25) causal empty(zero)"
    return f"softmax heads(4) width(8) scale(0.25) causal empty(zero) {gate}plus({SHARES[factor]}, {inner}, q=q1, k=k1)"


def traced(model: nn.Module) -> FxHost:
    return FxHost.from_captured(capture(model.eval(), {"x": example()}, dynamic_shapes=SHAPES))


def exported(model: nn.Module) -> onnx.ModelProto:
    written = io.BytesIO()
    torch.onnx.export(model.eval(), (example(),), written, dynamic_shapes=SHAPES, dynamo=True, verbose=False)
    return onnx.load_from_string(written.getvalue())


@pytest.mark.parametrize("of", ["weights", "outputs"])
@pytest.mark.parametrize("factor", SHARES)
def test_one_site(of, factor):
    found = recognise(traced(Differential(of=of, factor=factor)).graph)
    assert not found.refusals, found.refusals
    (site,) = found.sites
    assert str(site.spec) == line(factor)
    assert parse(str(site.spec)) == site.spec


def test_one_site_of_fused_attentions():
    (site,) = recognise(traced(Differential(attention="sdpa")).graph).sites
    assert [c.name for c in site.spec.plus] == ["plus"]
    assert site.size("h") == HEADS


def test_one_site_in_onnx():
    for of in ("weights", "outputs"):
        (site,) = recognise(OnnxHost.from_model(exported(Differential(of=of))).graph).sites
        assert str(site.spec) == line("head")


@pytest.mark.parametrize("of", ["weights", "outputs"])
def test_a_factor_of_the_first_is_a_gate(of):
    (site,) = recognise(traced(Differential(of=of, first=1.5)).graph).sites
    assert str(site.spec) == line("head", "gate(1.5) ")


@pytest.mark.parametrize("first", [0.0, 1.5])
@pytest.mark.parametrize("factor", SHARES)
def test_the_spec_says_what_the_model_computes(factor, first):
    model, x = Differential(factor=factor, first=first).eval(), example()
    q1, k1, q2, k2, v, _ = (t.detach() for t in model.operands(x))
    factors = {} if factor == "constant" else {"factor0": model.factor(x).detach()}
    out = reference(line(factor, f"gate({first}) " if first else ""), q1, k1, v, q1=q2, k1=k2, **factors)
    torch.testing.assert_close(model(x), model.o(out.transpose(1, 2).flatten(2)))


def test_it_costs_what_two_cost():
    shape = {"b": 2, "h": 4, "g": 4, "q": 64, "k": 64, "d": 8, "e": 8}
    both, one = cost(line("constant"), shape), cost("softmax heads(4) width(8) scale(0.25) causal empty(zero)", shape)
    assert both.flops == pytest.approx(2 * one.flops)


@pytest.mark.parametrize("of", ["weights", "outputs"])
@pytest.mark.parametrize("factor", SHARES)
def test_the_exact_rewrite_computes_the_same(of, factor):
    model = Differential(of=of, factor=factor, first=1.5).eval()
    fast = attnopt.optimize(model, {"x": example()}, select="always")
    assert fast.report.fused == 1
    assert [s.kernel for s in fast.report.sites] == ["summed-sdpa"]
    for x in (example(), example(3, 11)):
        torch.testing.assert_close(fast(x=x), model(x), rtol=1e-4, atol=1e-5)


def test_the_exact_rewrite_computes_the_same_in_onnx():
    fast = attnopt.optimize(exported(Differential()), {"x": example().numpy()}, select="always")
    assert fast.report.fused == 1
    assert fast.report.sites[0].kernel.startswith("summed-")
    assert fast.report.difference.max_rel < 1e-5


NEAR_MISSES = {
    "another scale": ({"scale": 2.0}, "is not softmax"),
    "another mask": ({"mask": "none"}, "is not softmax"),
    "a factor of the keys": ({"factor": "keys"}, "a factor on the weights varies along keys or channels"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    how, reason = NEAR_MISSES[name]
    found = recognise(traced(Differential(**how)).graph)
    assert not found.sites
    assert len(found.refusals) == 2
    assert all(reason in r.reason and r.remedy for r in found.refusals), found.refusals


@pytest.mark.parametrize("how", [{"values": "two"}, {"scale": 2.0}, {"mask": "none"}])
def test_outputs_that_are_not_alike_stay_two_sites(how):
    found = recognise(traced(Differential(of="outputs", **how)).graph)
    assert len(found.sites) == 2
    assert not any(site.spec.plus for site in found.sites)


class Paper(nn.Module):
    """The paper's own code: one softmax over twice the heads, every other one of which is subtracted before the product with v.

    read: what is subtracted: the other heads (pairs), the second half of them (halves), other keys (keys).
    """

    def __init__(self, heads: int = 4, groups: int = 4, read: str = "pairs") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.groups, self.read = heads, groups, read
        width = 2 * heads * WIDTH
        self.q, self.k, self.v, self.o = (nn.Linear(width, n) for n in (width, 2 * groups * WIDTH, 2 * groups * WIDTH, width))
        self.factor = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        shared = self.heads // self.groups
        q, k = (layer(x).view(batch, length, -1, WIDTH).transpose(1, 2) for layer in (self.q, self.k))
        v = self.v(x).view(batch, length, self.groups, 2 * WIDTH).transpose(1, 2).repeat_interleave(shared, 1)
        scores = torch.nan_to_num(q * 0.25 @ k.repeat_interleave(shared, 1).mT)
        scores = scores + torch.triu(torch.zeros(length, length).fill_(-torch.inf), 1)
        p = scores.softmax(-1, dtype=torch.float32)
        factor = torch.exp(torch.sum(self.factor * self.factor, -1)) - 0.2
        if self.read == "pairs":
            p = p.view(batch, self.heads, 2, length, length)
            p = p[:, :, 0] - factor * p[:, :, 1]
        elif self.read == "halves":
            first, second = p.chunk(2, 1)
            p = first - second * factor
        else:
            p = p[:, : self.heads] - factor * p[:, self.heads :].flip(-1)
        return self.o((p @ v).transpose(1, 2).reshape(batch, length, -1))


def doubled(batch: int = 2, length: int = 6) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, length, 2 * HEADS * WIDTH)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("read", "groups"), [("pairs", 4), ("pairs", 2), ("halves", 2)])
def test_one_softmax_over_both(read, groups):
    model = Paper(groups=groups, read=read).eval()
    found = recognise(FxHost.from_captured(capture(model, {"x": doubled()}, dynamic_shapes=SHAPES)).graph)
    assert not found.refusals, found.refusals
    (site,) = found.sites
    assert str(site.spec.with_(heads=None)) == (
        "softmax width(8, 16) scale(0.25) causal empty(zero)"
        " plus(-load(factor0), softmax scale(0.25) causal empty(zero), q=q1, k=k1)"
    )
    fast = attnopt.optimize(model, {"x": doubled()}, select="always")
    assert fast.report.fused == 1
    for x in (doubled(), doubled(3, 11)):
        torch.testing.assert_close(fast(x=x), model(x), rtol=1e-4, atol=1e-5)


def test_one_softmax_over_both_in_onnx():
    written = io.BytesIO()
    torch.onnx.export(Paper().eval(), (doubled(),), written, dynamic_shapes=SHAPES, dynamo=True, verbose=False)
    proto = onnx.load_from_string(written.getvalue())
    (site,) = recognise(OnnxHost.from_model(proto).graph).sites
    assert str(site.spec).startswith("softmax heads(4) width(8, 16) scale(0.25) causal empty(zero) plus(-")
    fast = attnopt.optimize(proto, {"x": doubled().numpy()}, select="always")
    assert fast.report.fused == 1
    assert fast.report.difference.max_rel < 1e-5


def test_parts_whose_keys_are_turned_around_are_no_sum():
    found = recognise(FxHost.from_captured(capture(Paper(read="keys").eval(), {"x": doubled()}, dynamic_shapes=SHAPES)).graph)
    assert not found.sites
    assert all(r.remedy for r in found.refusals)
