"""One decoding step with grouped heads, in both hosts, and what it should compute with its cache rounded as a spec's clause says."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from torch import nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.reference import reference
from attnopt.passes.cache_plan import clause_of, forms_of
from attnopt.patterns import recognise
from attnopt.plan.groups import Grouping


class Step(nn.Module):
    """Two query heads on each of two key heads; keys and values come and go as a tuple of tensors."""

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width = width
        self.q, self.k, self.v, self.o = (
            nn.Linear(a * width, b * width, bias=False, dtype=dtype) for a, b in ((4, 4), (4, 2), (4, 2), (4, 4))
        )

    def rows(self, x):
        return [p(x).view(*x.shape[:2], -1, self.width).transpose(1, 2) for p in (self.q, self.k, self.v)]

    def finished(self, x, attended):
        return x + self.o(attended.transpose(1, 2).reshape(x.shape))

    def forward(self, x, past):
        q, k, v = self.rows(x)
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.finished(x, nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)), (k, v)


def example(dtype=torch.float32, width=8, past=5, new=1):
    torch.manual_seed(1)
    channels = torch.ones(width, dtype=dtype)
    channels[3], channels[5] = 8, 0.1
    held = torch.randn(2, 2, past, width, dtype=dtype) * channels + channels, torch.randn(2, 2, past, width, dtype=dtype)
    held[1][1, 0, -1] = 0.5  # a row without any range
    return torch.randn(2, new, 4 * width, dtype=dtype), held


@functools.cache
def opened(kind, width=8, past=9):
    host = FxHost.from_captured(capture(Step(width=width).eval(), example(width=width, past=past)))
    return OnnxHost.from_model(host.to_onnx()) if kind == "onnx" else host


def whole(host):
    return Grouping(host, recognise(host.graph).sites).whole()[0]


def rewritten(rewrite, host, kind, evidence=None):
    candidate = next(c for c in rewrite.propose(whole(host), evidence) if c.kind == kind)
    made = host.copy()
    rewrite.apply(candidate, whole(made))
    made.finish()
    return made, candidate


def inputs_of(host, **sizes):
    x, past = example(**sizes)
    return dict(zip([s.name for s in host.input_specs], (x, *past), strict=True))


def seen_keys(site, width=8):
    """As calibration would say: the range of every channel of the keys, query heads sharing them."""
    x, past = example(width=width)
    rows = torch.cat([past[0], Step(width=width).eval().rows(x)[1]], 2).transpose(1, 2).flatten(2).flatten(0, 1)
    return SimpleNamespace(k=SimpleNamespace(low=rows.amin(0).double(), high=rows.amax(0).double()))


SEEN = SimpleNamespace(attention=seen_keys)


def wanted(candidate, **sizes):
    """What the step computes by the reference with the candidate's clause, and keys and values as they are."""
    model, (x, past) = Step(width=sizes.get("width", 8)).eval(), example(**sizes)
    q, k, v = model.rows(x)
    k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    operands = {}
    for numbers in candidate.options["balance"].values():
        operands = {n: torch.tensor(x).view(2, -1) for n, x in zip(("k_shift", "k_spread"), numbers, strict=True)}
    by_query = {n: x.repeat_interleave(2, 0) for n, x in operands.items()}  # the reference repeats key heads first
    line = f"softmax scale({model.width**-0.5}) {clause_of(candidate)}"
    return model.finished(x, reference(line, q, k, v, **by_query)), k, v


def check_step(rewrite, host, kind, evidence=None, **sizes):
    """One step from an exact past: the output of the reference, and the state that the same tokens packed at once are."""
    made, candidate = rewritten(rewrite, host, kind, evidence)
    assert len(recognise(made.graph).sites) == 1
    output, *present = made.runner()(made.adapt(inputs_of(host, **sizes)))
    expected, k, v = wanted(candidate, **sizes)
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=2e-6)
    forms, state = forms_of(candidate), []
    for side, x in (("k", k), ("v", v)):
        form = next((f for (_, s), f in forms.items() if s == side), None)
        state += [x] if form is None else form.packed(x)
    for got, want in zip(present, state, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        torch.testing.assert_close(got.float(), want.float(), atol=1e-6, rtol=1e-6)
    return made, candidate, output
