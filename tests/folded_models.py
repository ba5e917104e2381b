"""Tiny models in float64 and in both hosts, whose gains and biases matter, and how to fold them: made once for all tests."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.nn import functional as F

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.plan.folding import edited, offered
from attnopt.plan.options.groups import Grouping

WIDTH, VOCABULARY = 24, 40
IDS = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))


class SpelledNorm(nn.Module):
    """By root mean square, or of the row less its mean, with its gain as a multiplication."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.mean = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH)), mean

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.mean else x
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normed * self.weight + self.bias if self.mean else normed * self.weight


class Layer(nn.Module):
    """heads query heads on key_heads; `soft` caps the scores."""

    def __init__(self, norm, heads: int, key_heads: int, head: int, biased: bool, soft: bool) -> None:
        super().__init__()
        self.first, self.second = norm(), norm()
        self.head, self.repeats, self.soft = head, heads // key_heads, soft
        self.q = nn.Linear(WIDTH, heads * head, bias=biased)
        self.k, self.v = (nn.Linear(WIDTH, key_heads * head, bias=biased) for _ in "kv")
        self.o = nn.Linear(heads * head, WIDTH, bias=biased)
        self.up, self.down = nn.Linear(WIDTH, 32, bias=biased), nn.Linear(32, WIDTH)

    def forward(self, x):
        normed = self.first(x)
        q, k, v = (p(normed).unflatten(-1, (-1, self.head)).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (y.repeat_interleave(self.repeats, 1) for y in (k, v)) if self.repeats > 1 else (k, v)
        scores = q @ k.transpose(-1, -2) * self.head**-0.5
        scores = 2.0 * torch.tanh(scores / 2.0) if self.soft else scores
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        x = x + self.o((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Language(nn.Module):
    """One layer; norm: "layer" (one operation), "rms" or "mean" (spelled out). shared: the layer stands twice. tied: table and head."""

    def __init__(self, norm="layer", heads=3, key_heads=3, head=8, biased=True, soft=False, shared=False, tied=False) -> None:
        super().__init__()
        kinds = {"layer": lambda: nn.LayerNorm(WIDTH), "rms": lambda: SpelledNorm(False), "mean": lambda: SpelledNorm(True)}
        self.layer, self.times = Layer(kinds[norm], heads, key_heads, head, biased, soft), 2 if shared else 1
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(16, WIDTH)
        self.norm, self.out = kinds[norm](), nn.Linear(WIDTH, VOCABULARY, bias=not tied)
        if tied:
            self.out.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for _ in range(self.times):
            x = self.layer(x)
        return self.out(self.norm(x))


@functools.cache
def model(double: bool = True, **options) -> nn.Module:
    """Every gain and bias is drawn at random."""
    torch.manual_seed(0)
    made = Language(**options).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter += 0.5 * torch.randn_like(parameter)
    return made.double() if double else made


# One head of the model's width, gains and biases: an export that every fold has something to do in.
EXPORTED = {"norm": "rms", "heads": 1, "key_heads": 1, "head": WIDTH}


@functools.cache
def host(kind: str = "torch", **options):
    """In float64 in torch; in float32 in ONNX, whose runtime computes few operations in float64: always of EXPORTED."""
    if kind == "onnx":
        return OnnxHost.from_model(export())
    return FxHost.from_captured(capture(model(**options), {"ids": IDS}))


def export() -> onnx.ModelProto:
    """Made once per test session, for all of its processes."""
    folder = os.environ.get("ATTNOPT_TEST_EXPORTS")
    path = None if folder is None else Path(folder) / "folded.onnx"
    if path is not None and path.exists():
        return onnx.load(path)
    made = FxHost.from_captured(capture(model(False, **EXPORTED), {"ids": IDS})).to_onnx()
    if path is not None:
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(made.SerializeToString())
        fresh.replace(path)
    return made


def output(of) -> torch.Tensor:
    return of.runner()({next(v.name for v in of.graph.inputs): IDS})[0]


def folded(rewrite, given):
    """A copy after the first candidate for every group."""
    moves = offered(Grouping(given), rewrite)
    assert moves, refusals(rewrite, given)
    return edited(given, moves)


def refusals(rewrite, given) -> list[str]:
    found = [rewrite.propose(group, None) for group in Grouping(given).of(rewrite.per)]
    return [r.reason for r in found if isinstance(r, Refusal)]


def require_equal(made, given) -> None:
    """In float64 to 1e-10, in float32 to its own digits."""
    a, b = output(made), output(given)
    allowed = 1e-10 if b.dtype == torch.float64 else 2e-5
    assert float((a - b).abs().max()) <= allowed * max(1.0, float(b.abs().max()))
