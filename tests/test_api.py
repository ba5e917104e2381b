"""The public functions on every kind of model: what is found, what comes back, what stays untouched, how they refuse."""

from __future__ import annotations

import inspect as python_inspect
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from plan_fakes import clock
from self_attention import SPEC, SelfAttention, example
from torch import nn

import attnopt
from attnopt.asked import at_hand
from attnopt.cost.target import load_target
from attnopt.errors import (
    BudgetError,
    InputMismatch,
    UnknownPass,
    UnknownTarget,
    UnreadableModel,
    UnsupportedFormat,
    UntraceableModel,
)
from attnopt.plan.timing.timing import Timing

KINDS = ["module", "program", "graph_module", "pt2", "proto", "onnx"]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """One model in every form that the functions take."""
    folder, model = tmp_path_factory.mktemp("kinds"), SelfAttention().eval()
    plain = attnopt.optimize(model, example(), passes=[])
    program = torch.export.load(plain.export(folder / "m.pt2"))
    plain.export(folder / "m.onnx")
    return {
        "module": model,
        "program": program,
        "graph_module": program.module(),
        "pt2": folder / "m.pt2",
        "proto": onnx.load(folder / "m.onnx"),
        "onnx": str(folder / "m.onnx"),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kinds, kind):
    given = None if kind in ("program", "pt2", "proto", "onnx") else example()
    found = attnopt.inspect(kinds[kind], given)
    (site,) = found.sites
    assert found.refusals == ()
    assert site.name
    assert site.steps == ()
    if kind in ("module", "program"):  # the ONNX exporter may write the mask into the bias
        assert site.spec.startswith(SPEC)
    fast = attnopt.optimize(kinds[kind], given, select="always")
    assert fast.report.fused == 1
    for batch, length in ((2, 6), (3, 9)):
        named = example(batch, length)
        wanted = kinds["module"](**named)
        got = fast({n: x.numpy() for n, x in named.items()}) if kind in ("proto", "onnx") else fast(**named)
        outputs = got if isinstance(got, list) else [got["hidden"], got["first"]]
        for a, b in zip(outputs, wanted.values(), strict=True):
            torch.testing.assert_close(torch.as_tensor(a), b, atol=1e-5, rtol=1e-5)


def test_torch_returns_tensors_and_onnx_arrays(kinds):
    named = example()
    assert all(isinstance(x, torch.Tensor) for x in attnopt.optimize(kinds["module"], named)(**named).values())
    arrays = {name: x.numpy() for name, x in named.items()}
    assert all(isinstance(x, np.ndarray) for x in attnopt.optimize(kinds["proto"], arrays)(**arrays))


@pytest.mark.parametrize("given", ["tuple", "dict", "tensor", "mixed calls"])
def test_example_inputs_and_calls(given):
    model, named = SelfAttention().eval(), example()
    x, seen = named.values()
    inputs = {"tuple": (x, seen), "dict": named, "tensor": x, "mixed calls": named}[given]
    fast = attnopt.optimize(model, inputs, select="always")
    assert python_inspect.signature(fast.module) == python_inspect.signature(model.forward)
    calls = (
        [lambda f: f(x)] if given == "tensor" else [lambda f: f(x, seen), lambda f: f(x, seen=seen), lambda f: f(seen=seen, x=x)]
    )
    for call in calls:
        got, wanted = call(fast), call(model)
        assert list(got) == list(wanted) == ["hidden", "first"]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputMismatch, match=r"optimised for the value|was not among the example inputs"):
        fast(*((x,) if given == "tensor" else (x, seen)), many=False)


def test_the_return_type_stays():
    model, x = SelfAttention().eval(), torch.randn(2, 5, 64)
    fast = attnopt.optimize(model, {"x": x, "many": False}, select="always")
    got = fast(x, many=False)
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got, model(x, many=False), atol=1e-5, rtol=1e-5)


def test_the_model_is_not_touched():
    model, fired = SelfAttention().train(), []
    model.o.eval()
    model.q.requires_grad_(False)
    model.register_forward_hook(lambda *_: fired.append("model"))
    model.q.register_forward_pre_hook(lambda *_: fired.append("q"))

    def state():
        return {
            "weights": {name: p.clone() for name, p in model.state_dict().items()},
            "training": {name: m.training for name, m in model.named_modules()},
            "gradients": {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
            "hooks": {name: (list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()},
            "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        }

    before, identities = state(), {name: id(p) for name, p in model.named_parameters()}
    fast = attnopt.optimize(model, example(), select="always", budget=0.5)
    after = state()
    torch.testing.assert_close(after.pop("weights"), before.pop("weights"), atol=0, rtol=0)
    assert after == before
    assert identities == {name: id(p) for name, p in model.named_parameters()}
    fired.clear()
    fast(**example())
    assert fired == []
    model(**example())
    assert fired == ["q", "model"]


def test_a_proto_and_a_file_are_not_touched(kinds):
    proto, path = kinds["proto"], kinds["onnx"]
    before, content = proto.SerializeToString(), Path(path).read_bytes()
    attnopt.optimize(proto, select="always", budget=0.5)
    attnopt.optimize(path, select="always", budget=0.5)
    assert proto.SerializeToString() == before
    assert Path(path).read_bytes() == content


def test_a_model_without_attention(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1)), torch.randn(3, 8)
    found = attnopt.inspect(model, (x,))
    assert found.sites == ()
    assert [r.reason for r in found.refusals] == ["nothing follows the softmax: no product with values follows"]
    fast = attnopt.optimize(model, (x,))
    assert str(fast.report).startswith("no attention found, nothing replaced")
    torch.testing.assert_close(fast(x), model(x), atol=0, rtol=0)
    torch.testing.assert_close(attnopt.load(fast.export(tmp_path / "m.pt2"))(x), model(x))
    torch.testing.assert_close(torch.from_numpy(attnopt.load(fast.export(tmp_path / "m.onnx"))(x)[0]), model(x))


def test_costs_are_of_the_example_inputs(kinds):
    (site,) = attnopt.inspect(kinds["module"], example(2, 6)).sites
    (twice,) = attnopt.inspect(kinds["module"], example(4, 6)).sites
    assert site.flops
    assert twice.flops == 2 * site.flops


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


X = torch.randn(2, 5, 64)


@pytest.mark.parametrize(
    ("model", "inputs", "options", "error", "says"),
    [
        (42, None, {}, UnsupportedFormat, "a int is not a model"),
        ({}, None, {}, UnsupportedFormat, "a dict is not a model"),
        ("m.bin", None, {}, UnreadableModel, "there is no file 'm.bin'"),
        (__file__, None, {}, UnsupportedFormat, "is neither .onnx nor .pt2"),
        ("absent.pt2", None, {}, UnreadableModel, "there is no file"),
        (Branching(), (X,), {}, UntraceableModel, r"test_api.py:\d+ in forward"),
        (SelfAttention(), None, {}, InputMismatch, "example_inputs"),
        (SelfAttention(), (torch.randn(2, 5, 63),), {}, InputMismatch, "does not run on the example inputs"),
        (SelfAttention(), (X, None, X), {}, InputMismatch, "do not fit the model's parameters"),
        (SelfAttention(), {"y": X}, {}, InputMismatch, "do not fit the model's parameters"),
        (SelfAttention(), (X,), {"target": "h20"}, UnknownTarget, "Did you mean 'h200'"),
        (SelfAttention(), (X,), {"passes": ["fuse"]}, UnknownPass, "`attnopt passes` lists all"),
        (SelfAttention(), (X,), {"budget": "much"}, BudgetError, "is not a number of at least 0"),
        (SelfAttention(), (X,), {"select": "best"}, BudgetError, "measure, model, always"),
        (SelfAttention(), (X,), {"calibration": []}, InputMismatch, "calibration is not a non-empty list"),
        (SelfAttention(), (X,), {"calibration": [(torch.randn(2, 5, 3),)]}, InputMismatch, r"input 'x' is float32\[2, 5, 3\]"),
    ],
)
def test_bad_input(model, inputs, options, error, says):
    with pytest.raises(error, match=says) as raised:
        attnopt.optimize(model, inputs, **options)
    assert raised.value.exit_code == 2
    assert raised.value.next_move


def test_inputs_that_do_not_fit_an_onnx_model(kinds):
    for inputs, says in (
        ({"x": X}, "input 'seen' is missing"),
        ((X,), "input 'seen' is missing"),
        ((X, X), r"input 'seen' is float32\[2, 5, 64\]"),
        ({"x": X, "seen": X[..., 0] > 0, "more": X}, "the model has no input 'more'"),
    ):
        with pytest.raises(InputMismatch, match=says):
            attnopt.optimize(kinds["proto"], inputs)


def test_what_is_at_hand():
    (cpu, _), (gpu, _), here = load_target("cpu"), load_target("h200"), {"x": torch.zeros(2)}
    assert [at_hand(cpu, here), at_hand(cpu, None), at_hand(gpu, here), at_hand(gpu, None)] == [True, True, False, False]


class TracedOtherwise(nn.Module):
    """Does more, or something else, while torch.export looks on."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.attention, self.what, self.calls = SelfAttention(), what, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            x = x + 1 if self.what == "other" else x
        else:
            self.calls += 1
        return self.attention(x, many=False)


def test_the_time_before_is_that_of_the_model_itself(monkeypatch):
    timed = {}

    def turns(calls, **options):
        timed.update({name: call() for name, call in calls.items()})
        return {name: Timing((2.0 if name == "after" else 1.0,)) for name in calls}

    monkeypatch.setattr("attnopt.plan.pipeline.in_turn", turns)
    model, x = TracedOtherwise("more").eval(), torch.randn(2, 5, 64)
    monkeypatch.setattr("attnopt.plan.choose.in_turn", clock({"sdpa": 0.5}))
    fast = attnopt.optimize(model, (x,), passes=["fuse-attention"], select="measure")
    assert isinstance(timed["before"], torch.Tensor) and isinstance(timed["after"], list)  # its own type, and the graph's outputs
    assert fast.report.fused == 0 and fast.report.notes[0].startswith("rolled back: the whole model measured 2e+03 ms")
    before = model.calls
    assert torch.equal(fast(x), model(x))
    assert model.calls == before + 2


def test_a_trace_of_something_else_is_not_optimised():
    with pytest.raises(UntraceableModel, match="something else than the model: its outputs differ by"):
        attnopt.optimize(TracedOtherwise("other").eval(), (torch.randn(2, 5, 64),))
