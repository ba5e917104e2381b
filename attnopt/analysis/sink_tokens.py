"""Tokens whose hidden states point where the first token's do: attention sinks, with the layers in which they live.

    n_l = ||h_l[p]||      life of the primary sink p: from the layer after its largest growth to that of its largest fall
    t > p is a candidate in a layer of that life where |cos(h_l[t], h_l[p])| > 0.9; how many layers that is tells what it is

A candidate of few layers is noise, one of nearly all of them is like the primary sink, others are secondary sinks. The thresholds of the
source (4 and 15 of 40 or more layers) are shares of the depth here.
Source: "Secondary attention sinks" (its code for the life of the primary sink).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

COSINE = 0.9
NOISE = 0.08  # of the layers: lives up to this are noise
REST = 0.3  # of the layers: a life that leaves no more than this out is like the primary sink's


@dataclass(frozen=True)
class Sinks:
    """primary: the token, and its life [start, end). kinds: "noise", "secondary" or "primary" by token; lives: its layers."""

    primary: int
    start: int
    end: int
    kinds: Mapping[int, str]
    lives: Mapping[int, tuple[int, ...]]

    def of(self, kind: str) -> tuple[int, ...]:
        return tuple(t for t, found in self.kinds.items() if found == kind)

    @property
    def protected(self) -> tuple[int, ...]:
        """Tokens that are to be kept: the primary sink, and what is like it or secondary."""
        return (self.primary, *(t for t, kind in self.kinds.items() if kind != "noise"))


def sink_tokens(hidden: Tensor, primary: int = 0, cosine: float = COSINE) -> Sinks:
    """hidden [layers + 1, tokens, width]: what enters each layer of one sequence, and what leaves the last."""
    layers = len(hidden) - 1
    norms = hidden[:, primary].double().norm(dim=-1)
    growth = norms[1:] - norms[:-1]
    start = int(growth.argmax()) + 1
    later = growth[start:]
    end = start + int(later.argmin()) + 1 if len(later) else layers + 1
    own = torch.nn.functional.normalize(hidden[:, primary].double(), dim=-1)
    along = (torch.nn.functional.normalize(hidden.double(), dim=-1) * own[:, None]).sum(-1).abs() > cosine
    lives: dict[int, tuple[int, ...]] = {}
    for token in range(primary + 1, hidden.shape[1]):
        life = tuple(layer for layer in range(start, end) if bool(along[layer, token]))
        if life:
            lives[token] = life
    return Sinks(primary, start, end, {t: kind_of(len(life), layers) for t, life in lives.items()}, lives)


def kind_of(life: int, layers: int) -> str:
    if life <= max(1.0, NOISE * layers):
        return "noise"
    return "primary" if life >= layers - REST * layers else "secondary"


def received_by(weights: Tensor) -> Tensor:
    """Sink score of each token: the mean over heads and later queries of its weight. weights [heads, queries, keys], causal."""
    queries, keys = weights.shape[-2:]
    later = torch.arange(queries)[:, None] + keys - queries > torch.arange(keys)
    return (weights.double() * later).sum((0, 1)) / (len(weights) * later.sum(0).clamp(min=1))
