"""ONNX exports of the tiny models, by torch's two exporters; each is made once per test session, for all of its processes."""

from __future__ import annotations

import functools
import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import hf_models
import onnx
import torch
from torch import nn

CASES = [(family, attention, "dynamo") for family, attention in hf_models.CASES]
CASES += [("bert", "eager", "torchscript"), ("gpt2", "eager", "torchscript")]


class FirstOutput(nn.Module):
    """What the TorchScript exporter can take: two tensors in, one out."""

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options)[0]


@functools.cache
def export(family: str, attention: str, exporter: str, opset: int | None = None) -> onnx.ModelProto:
    """The export, taken from the session's folder where another process has made it already."""
    folder = os.environ.get("ATTNOPT_TEST_EXPORTS")
    if folder is None:
        return exported(family, attention, exporter, opset)
    kept = Path(folder) / f"{family}-{attention}-{exporter}-{opset}.onnx"
    if not kept.exists():
        fresh = kept.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(exported(family, attention, exporter, opset).SerializeToString())
        fresh.replace(kept)
    return onnx.load(kept)


def exported(family: str, attention: str, exporter: str, opset: int | None) -> onnx.ModelProto:
    model = hf_models.build(family, attention)
    named = hf_models.inputs(family)
    tensors = {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if exporter == "torchscript":
            options = {name: x for name, x in named.items() if name not in tensors}
            buffer = io.BytesIO()
            axes = {name: {0: "batch", 1: "sequence"} for name in tensors}
            torch.onnx.export(
                FirstOutput(model, options).eval(), tuple(tensors.values()), buffer, dynamo=False, opset_version=opset or 17,
                input_names=list(tensors), output_names=["output"], dynamic_axes={**axes, "output": {0: "batch", 1: "sequence"}},
            )  # fmt: skip
            return onnx.load_from_string(buffer.getvalue())
        dims = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} if name in tensors else None for name in named}
        program = torch.onnx.export(model, (), kwargs=named, dynamo=True, dynamic_shapes=dims, opset_version=opset, verbose=False)
        return program.model_proto


def tensors(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}
