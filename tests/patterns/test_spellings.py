"""One spec, spelled at random in torch: every spelling lifts to it, traced and through ONNX; graphs wrong in one place do not."""

from __future__ import annotations

import io
import logging
import random
import warnings

import onnx
import pytest
import torch
from torch import Tensor, nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.patterns import recognise

HEADS, GROUPS, WIDTH, LONGEST = 4, 2, 8, 32
SCALE = 0.125
SPEC = f"softmax heads({HEADS}, {GROUPS}) width({WIDTH}) scale({SCALE}) causal"

CHOICES = {
    "heads": ("expand", "repeat_interleave", "grouped"),
    "layout": ("four", "three", "einsum"),
    "scale": ("multiply", "divide", "query", "key", "both"),
    "mask": ("fill", "where", "added", "subtracted", "triangle", "buffer", "logical", "index"),
    "before": (True, False),  # scale before the mask
    "softmax": ("plain", "float32", "by hand", "shifted"),
}


class Spelled(nn.Module):
    """Causal grouped attention, spelled as `how` says."""

    def __init__(self, how: dict[str, object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = HEADS * WIDTH
        self.how = how
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * GROUPS * WIDTH)
        self.register_buffer("seen", torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        how = self.how
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, HEADS, WIDTH).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, GROUPS, WIDTH).permute(2, 0, 3, 1, 4)
        if how["scale"] == "query":
            q = q * SCALE
        if how["scale"] == "key":
            k = k / (1 / SCALE)
        if how["scale"] == "both":
            q, k = q * 0.5, k * (SCALE * 2)
        if how["heads"] == "repeat_interleave":
            k, v = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (k, v))
        elif how["heads"] == "expand":
            shape = (batch, GROUPS, HEADS // GROUPS, length, WIDTH)
            k, v = (t[:, :, None].expand(shape).reshape(batch, HEADS, length, WIDTH) for t in (k, v))
        else:
            q = q.reshape(batch, GROUPS, HEADS // GROUPS, length, WIDTH)
            k, v = k[:, :, None], v[:, :, None]
        scores = self.product(q, k)
        if how["before"]:
            scores = self.masked(self.scaled(scores), length)
        else:
            scores = self.scaled(self.masked(scores, length))
        out = self.weighted(self.weights(scores), v)
        return self.o(out.reshape(batch, HEADS, length, WIDTH).transpose(1, 2).reshape(batch, length, HEADS * WIDTH))

    def product(self, q: Tensor, k: Tensor) -> Tensor:
        if self.how["heads"] == "grouped" or self.how["layout"] == "four":
            return q @ k.transpose(-1, -2)
        if self.how["layout"] == "einsum":
            return torch.einsum("bhqd,bhkd->bhqk", q, k)
        batch, heads, length, width = q.shape
        flat = torch.bmm(q.reshape(-1, length, width), k.reshape(-1, length, width).transpose(1, 2))
        return flat.view(batch, heads, length, length)

    def weighted(self, weights: Tensor, v: Tensor) -> Tensor:
        if self.how["heads"] != "grouped" and self.how["layout"] == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", weights, v)
        return weights @ v

    def scaled(self, scores: Tensor) -> Tensor:
        if self.how["scale"] == "multiply":
            return scores * SCALE
        return scores / (1 / SCALE) if self.how["scale"] == "divide" else scores

    def masked(self, scores: Tensor, length: int) -> Tensor:
        kind, lowest = self.how["mask"], torch.finfo(scores.dtype).min
        positions = torch.arange(length)
        rows, columns = positions[:, None], positions[None]
        if kind == "fill":
            return scores.masked_fill(columns > rows, -float("inf"))
        if kind == "where":
            return torch.where(columns <= rows, scores, lowest)
        if kind == "added":
            return scores + torch.where(columns - rows > 0, -float("inf"), 0.0)
        if kind == "subtracted":
            return scores + (1.0 - (rows >= columns).to(scores.dtype)) * lowest
        if kind == "triangle":
            return scores + torch.full((length, length), -float("inf")).triu(1)
        if kind == "buffer":
            return scores.masked_fill(~self.seen[0, 0, :length, :length], lowest)
        if kind == "logical":
            return scores.masked_fill(~((columns < rows) | (columns == rows)), lowest)
        return scores + torch.zeros(length, length).masked_fill(rows < columns, lowest)

    def weights(self, scores: Tensor) -> Tensor:
        kind = self.how["softmax"]
        if kind == "plain":
            return scores.softmax(-1)
        if kind == "float32":
            return nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
        if kind == "shifted":
            return torch.softmax(scores - scores.amax(-1, keepdim=True), dim=-1)
        e = torch.exp(scores - scores.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True)


def drawn(seed: int) -> dict[str, object]:
    source = random.Random(seed)
    return {name: source.choice(options) for name, options in CHOICES.items()}


def said(sites) -> str:
    """The one line; what a row without keys gets differs by spelling, and no row here is without."""
    (line,) = (str(site.spec) for site in sites)
    return line.removesuffix(" empty(zero)")


@pytest.mark.sampled(8)
@pytest.mark.parametrize("seed", range(20))
def test_traced(seed):
    how = drawn(seed)
    found = recognise(FxHost.from_captured(capture(Spelled(how).eval(), (torch.randn(2, 12, HEADS * WIDTH),))).graph)
    assert not found.refusals, (how, found.refusals)
    assert said(found.sites) == SPEC, how


@pytest.mark.sampled(2)
@pytest.mark.parametrize("seed", range(20, 28))
def test_through_onnx(seed):
    how = drawn(seed)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    dims = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=LONGEST)},)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Spelled(how).eval(), (torch.randn(2, 12, HEADS * WIDTH),), buffer, dynamo=True, dynamic_shapes=dims, verbose=False
        )
    found = recognise(OnnxHost.from_model(onnx.load_from_string(buffer.getvalue())).graph)
    assert not found.refusals, (how, found.refusals)
    assert said(found.sites) == SPEC, how


class Wrong(Spelled):
    """The same, wrong in one place."""

    def __init__(self, what: str, seed: int) -> None:
        super().__init__({**drawn(seed), "heads": "expand"})
        self.what = what

    def weights(self, scores: Tensor) -> Tensor:
        if self.what == "axis":
            return scores.softmax(-2)
        if self.what == "mask after":
            return scores.softmax(-1) + self.seen[..., : scores.shape[-2], : scores.shape[-1]].to(scores.dtype)
        if self.what == "squared":
            return scores.softmax(-1) ** 2
        if self.what == "logarithm":
            return scores.log_softmax(-1)
        return torch.exp(scores).softmax(-1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("axis", "the softmax runs over q, not over the keys"),
        ("mask after", "the weights enter 'add'"),
        ("squared", "the weights enter 'pow'"),
        ("logarithm", ""),
        ("exponent", "'exp' stands between"),
    ],
)
@pytest.mark.sampled(6)
def test_wrong_in_one_place(what, reason, seed):
    found = recognise(FxHost.from_captured(capture(Wrong(what, seed).eval(), (torch.randn(2, 12, HEADS * WIDTH),))).graph)
    assert found.sites == ()
    assert [reason in refusal.reason for refusal in found.refusals] == ([True] if reason else [])
    assert all(refusal.remedy and refusal.reached and refusal.source.line for refusal in found.refusals)
