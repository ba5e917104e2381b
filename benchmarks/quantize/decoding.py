"""A language model as the graph of one decoding step, for onnxruntime: past keys and values come and go as tensors of their own."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.passes.candidate import Pass
from attnopt.patterns import recognise
from attnopt.plan.options.groups import Grouping


class Decoding(nn.Module):
    """(ids [B, 1], ((k, v), …))   ->   logits [B, 1, V], ((k, v), …)"""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, past):
        cache = transformers.DynamicCache()
        for layer, (k, v) in enumerate(past):
            cache.update(k, v, layer)
        logits = self.model(ids, past_key_values=cache, use_cache=True).logits
        return logits, tuple((layer.keys, layer.values) for layer in cache.layers)


@torch.no_grad()
def past_of(model: nn.Module, ids: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """What these tokens [B, L] leave in the cache, by layer."""
    return tuple((layer.keys, layer.values) for layer in model(ids, use_cache=True).past_key_values.layers)


def step(model: nn.Module, ids: Tensor) -> tuple[OnnxHost, dict[str, Tensor]]:
    """The graph of the step that reads the last of `ids` [B, L], and its inputs."""
    past, free = past_of(model, ids[:, :-1]), torch.export.Dim.DYNAMIC
    two = tuple((k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)) for k, v in past)  # torch.export takes a size of 1 for all sizes
    dims = {"ids": {0: free}, "past": tuple(({0: free, 2: free}, {0: free, 2: free}) for _ in past)}
    traced = FxHost.from_captured(capture(Decoding(model).eval(), (ids[:, -1:].repeat(2, 1), two), dims))
    host = OnnxHost.from_model(traced.to_onnx())
    flat = [ids[:, -1:], *(x for pair in past for x in pair)]
    return host, dict(zip([s.name for s in host.input_specs], flat, strict=True))


def with_cache(host: OnnxHost, rewrite: Pass, kind: str) -> OnnxHost:
    """The step after one rewrite of its cache."""
    proposed = rewrite.propose(Grouping(host, recognise(host.graph).sites).whole()[0], None)
    assert isinstance(proposed, list), str(proposed)
    candidate = next(c for c in proposed if c.kind == kind)
    made = host.copy()
    rewrite.apply(candidate, Grouping(made, recognise(made.graph).sites).whole()[0])
    made.finish()
    return made
