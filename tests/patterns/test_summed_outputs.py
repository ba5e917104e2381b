"""Heads run as one attention, whose halves are subtracted afterwards, are one attention of two softmaxes; near misses stay as they are."""

from __future__ import annotations

import io

import onnx
import pytest
import torch
import transformers
from torch import Tensor, nn

import attnopt
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.reference import reference
from attnopt.ir.spec import parse
from attnopt.patterns import recognise

HEADS, GROUPS, WIDTH = 8, 4, 4
SHAPES = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
INNER = "softmax scale(0.5) causal empty(zero)"
SPEC = f"softmax heads(4, 2) width(4, 8) scale(0.5) causal empty(zero) plus(-load(factor0), {INNER}, q=q1, k=k1)"


class Halves(nn.Module):
    """Half of the heads are subtracted from the other half, over values twice as wide that both read.

    calls: two over half of the values each, or one over both. repeat: values repeated for both halves, or heads of their own.
    """

    def __init__(self, **how: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.o = nn.Linear(32, HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 32)
        self.k, self.v = (nn.Linear(32, GROUPS * WIDTH) for _ in range(2))
        self.factor = nn.Parameter(torch.rand(4))
        self.how = {"calls": 2, "attention": "eager", "repeat": True, "bias": False, "also": "", "scale": 1.0, "cut": 4, **how}

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        q, k, v = (layer(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return q, k, list(v.chunk(2, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        if self.how["attention"] == "sdpa":
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5).transpose(1, 2)
        length = q.shape[2]
        scores = q @ k.mT * (0.5 * scale) + torch.full((length, length), -torch.inf).triu(1)
        if self.how["bias"]:
            scores = scores + torch.arange(HEADS)[:, None, None] * torch.arange(length)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        how = self.how
        q, k, parts = self.operands(x)
        parts = parts if how["calls"] == 2 else [torch.cat(parts, -1)]
        if not how["repeat"]:
            parts = [torch.cat([part, part.flip(1)], 1) for part in parts]
        else:
            parts = [part.repeat(1, 2, 1, 1) for part in parts]
        if how["calls"] == 2:
            out = torch.cat([self.attend(q, k, parts[0]), self.attend(q, k, parts[1], how["scale"])], -1)
        else:
            out = self.attend(q, k, parts[0])
        factor = (self.factor * self.factor).sum().exp()
        first, second = (out[:, :, :4], out[:, :, 4:]) if how["cut"] == 4 else (out[:, :, 1:5], out[:, :, 4:])
        mixed = self.o((first - factor * second).flatten(2))
        return mixed + out.mean() if how["also"] == "read" else mixed


def example(batch: int = 2, length: int = 6) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, length, 32)


def traced(model: nn.Module) -> FxHost:
    return FxHost.from_captured(capture(model.eval(), {"x": example()}, dynamic_shapes=SHAPES))


def exported(model: nn.Module) -> onnx.ModelProto:
    written = io.BytesIO()
    torch.onnx.export(model.eval(), (example(),), written, dynamic_shapes=SHAPES, dynamo=True, verbose=False)
    return onnx.load_from_string(written.getvalue())


@pytest.mark.parametrize(("calls", "attention"), [(1, "eager"), (2, "eager"), (2, "sdpa")])
def test_one_site(calls, attention):
    model = Halves(calls=calls, attention=attention)
    found = recognise(traced(model).graph)
    assert not found.refusals, found.refusals
    (site,) = found.sites
    assert str(site.spec) == (SPEC if attention == "eager" else SPEC.replace(" empty(zero)", ""))
    assert parse(str(site.spec)) == site.spec
    fast = attnopt.optimize(model, {"x": example()}, select="always")
    assert fast.report.fused == 1
    for x in (example(), example(3, 11)):
        torch.testing.assert_close(fast(x=x), model(x), rtol=1e-4, atol=1e-5)


def test_one_site_in_onnx():
    proto = exported(Halves())
    (site,) = recognise(OnnxHost.from_model(proto).graph).sites
    assert [c.name for c in site.spec.plus] == ["plus"]
    assert (site.size("h"), site.size("g"), site.size("e")) == (4, 2, 8)
    fast = attnopt.optimize(proto, {"x": example().numpy()}, select="always")
    assert fast.report.fused == 1
    assert fast.report.difference.max_rel < 1e-5


def test_the_spec_says_what_the_model_computes():
    model, x = Halves().eval(), example()
    q, k, parts = model.operands(x)
    v, factor = torch.cat(parts, -1), (model.factor * model.factor).sum().exp()
    out = reference(SPEC, q[:, :4], k[:, :2], v, q1=q[:, 4:], k1=k[:, 2:], factor0=factor)
    torch.testing.assert_close(model(x), model.o(out.transpose(1, 2).flatten(2)))


NEAR_MISSES = {
    "a bias of each head": ({"bias": True}, 2),
    "values of each half": ({"repeat": False}, 2),
    "outputs that are read elsewhere": ({"also": "read"}, 2),
    "attentions of another scale": ({"scale": 2.0}, 2),
    "heads that are no equal parts": ({"cut": 1, "calls": 1}, 1),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    how, count = NEAR_MISSES[name]
    model = Halves(**how)
    found = recognise(traced(model).graph)
    assert len(found.sites) == count
    assert not any(site.spec.plus for site in found.sites)
    fast = attnopt.optimize(model, {"x": example()}, select="always")
    torch.testing.assert_close(fast(x=example()), model(example()), rtol=1e-4, atol=1e-5)


def test_the_layers_of_diffllama():
    config = transformers.DiffLlamaConfig(
        hidden_size=32, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=1, vocab_size=50, intermediate_size=48,
        pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.DiffLlamaForCausalLM(config).eval()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, -3:] = 0
    given = {"input_ids": torch.randint(1, 50, (2, 12)), "attention_mask": mask, "use_cache": False}
    fast = attnopt.optimize(model, given, select="always")
    assert (len(fast.report.sites), fast.report.fused) == (1, 1)
    assert all(site.before.startswith("softmax heads(4, 2) width(4, 8)") and "plus(" in site.before for site in fast.report.sites)
    assert fast.report.difference.max_rel < 1e-5
