"""Language models of transformers as graphs of one decoding step: past keys and values come and go as tensors of their own."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost


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
def past_of(model: nn.Module, ids: Tensor):
    """What these tokens leave in the cache."""
    found = model(ids, use_cache=True).past_key_values
    return tuple((layer.keys, layer.values) for layer in found.layers)


def step_of(model: nn.Module, ids: Tensor, kind: str = "torch"):
    """The graph of one step in one of the hosts, traced after all of `ids` [B, L] but the last."""
    past, free = past_of(model, ids[:, :-1]), torch.export.Dim.DYNAMIC
    dims = {"ids": {0: free}, "past": tuple(({0: free, 2: free}, {0: free, 2: free}) for _ in past)}
    host = FxHost.from_captured(capture(Decoding(model).eval(), (ids[:, -1:], past), dims))
    return OnnxHost.from_model(host.to_onnx()) if kind == "onnx" else host


def named(host, ids: Tensor, past) -> dict[str, Tensor]:
    """Inputs of such a host by name."""
    flat = [ids, *(x for pair in past for x in pair)]
    return dict(zip([s.name for s in host.input_specs], flat, strict=True))
