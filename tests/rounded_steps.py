"""One decoding step with grouped heads, in both hosts, and what it should compute with its cache rounded as a spec's clause says."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from cached_step import Step, example

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.reference import reference
from attnopt.passes.edits.caches.plan import forms_of
from attnopt.patterns import recognise
from attnopt.plan.options.groups import Grouping


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
    ((_, clause),) = candidate.cached.items()
    line = f"softmax scale({model.width**-0.5}) {clause}"
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
