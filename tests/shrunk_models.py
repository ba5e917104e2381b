"""Hosts of tiny models whose heads are changed, and how to change them: made once for all tests."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.plan.options.groups import Grouping

VOCABULARY = 50
IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))


class Packed(nn.Module):
    """Four heads of 8 channels, queries, keys and values from one layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).split(32, -1))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Turned(nn.Module):
    """Four heads on two key heads of 8 channels, which positions turn."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, n * 8, bias=False) for n in (4, 2, 2))
        self.o = nn.Linear(32, 32, bias=False)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.register_buffer("inv_freq", 100.0 ** -(torch.arange(0, 8, 2) / 8))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        angle = torch.arange(x.shape[1])[:, None].float() * self.inv_freq.float()
        cos, sin = (torch.cat([wave, wave], -1).to(x.dtype) for wave in (angle.cos(), angle.sin()))
        q, k = (y * cos + torch.cat([-y[..., 4:], y[..., :4]], -1) * sin for y in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Normed(Turned):
    """The same with queries and keys normalised by head before they turn, as Qwen3 and Gemma 3 have them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(8, eps=1e-6), nn.RMSNorm(8, eps=1e-6)
        for norm in (self.q_norm, self.k_norm):
            nn.init.uniform_(norm.weight, 0.2, 0.6)


class Language(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.attentions = nn.ModuleList(kind() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))

    def forward(self, input_ids):
        x = self.table(input_ids)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x))
        return self.head(x)


@functools.cache
def model(family: str) -> nn.Module:
    """ "packed", "turned" or "normed". Heads and biases are large enough to matter."""
    torch.manual_seed(0)
    made = Language({"packed": Packed, "turned": Turned, "normed": Normed}[family]).eval()
    with torch.no_grad():
        for attention in made.attentions:
            for parameter in attention.parameters():
                parameter *= 3.0
    return made


@functools.cache
def host(family: str, kind: str):
    made = FxHost.from_captured(capture(model(family), {"input_ids": IDS}))
    return OnnxHost.from_model(made.to_onnx()) if kind == "onnx" else made


def seen(given, inputs=None) -> Evidence:
    return Evidence(given, Calibration.of(given.graph, [inputs or {"input_ids": IDS}]), sites=Grouping(given).sites)


@functools.cache
def evidence(family: str, kind: str) -> Evidence:
    return seen(host(family, kind))


def output(of) -> torch.Tensor:
    return of.runner()({"input_ids": IDS})[0]


def rewritten(given, change, blocks=(0, 1)):
    """A copy in which `change(group)` was made to these blocks, one after the other."""
    made = given.copy()
    for at in blocks:
        change(Grouping(made).of("block")[at])
        made.finish()
    return made


def applied(rewrite, found, given, kind: str, blocks=(0, 1)):
    """A copy after the candidate of one kind in these blocks."""
    groups = Grouping(given).of("block")

    def change(group):
        offers = rewrite.propose(next(g for g in groups if g.name == group.name), found)
        rewrite.apply(next(c for c in offers if c.kind == kind), group)

    return rewritten(given, change, blocks)
