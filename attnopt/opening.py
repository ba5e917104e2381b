"""Open whatever the user gave: choose the host, name the example inputs, read calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.analysis.calibration import Calibration, read_calibration
from attnopt.errors import UnreadableModel, UnsupportedFormat
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.fx.own_call import OwnCall, own_call
from attnopt.hosts.module.traceable import traceable
from attnopt.hosts.onnx import OnnxHost


@dataclass(frozen=True)
class Opened:
    """A model in its host, with named example inputs (None where there are none). model: what was traced."""

    host: FxHost | OnnxHost
    inputs: Mapping[str, Tensor] | None
    runtime: str
    opset: int
    model: Any = None

    @property
    def output_name(self) -> str:
        return self.host.output_names[0] if self.host.output_names else ""

    def own_call(self) -> OwnCall | None:
        """The given model on named inputs, where it is more than a graph and a call leaves no mark."""
        if self.inputs is None or not isinstance(self.host, FxHost):
            return None
        return own_call(self.model, self.host, self.inputs)

    def symbols(self) -> dict[str, int]:
        """Values of the graph's symbolic sizes at the example inputs."""
        return self.host.graph.sizes(self.inputs or {})

    def batches(self, calibration: Any) -> list[Mapping[str, Tensor]]:
        """Calibration inputs as named tensors, checked against the model's inputs."""
        if calibration is None:
            return []
        names = [spec.name for spec in self.host.input_specs]
        return read_calibration(calibration, names, self.host.named_inputs)

    def calibration(self, given: Any) -> Calibration:
        """Calibration data in samples: those given, else the example inputs (which are few)."""
        batches = self.batches(given) or ([self.inputs] if self.inputs is not None else [])
        return Calibration.of(self.host.graph, batches)


def open_model(model: Any, example_inputs: Any, *, dynamic_shapes: Any, need_inputs: bool) -> Opened:
    """The host for a module, an exported program, a graph module, an ONNX proto, or a path. See `attnopt.optimize`."""
    if is_onnx(model):
        host = OnnxHost.from_model(model)
        inputs = (
            host.named_inputs(example_inputs) if example_inputs is not None else host.example_inputs() if need_inputs else None
        )
        if inputs is None:
            inputs = host.example_inputs()
        return Opened(host, inputs, "onnxruntime", host.opset)
    model = traceable(model)
    fx = FxHost.from_captured(capture(model, example_inputs, dynamic_shapes))
    return Opened(fx, fx.example_inputs(), "torch", 0, model)


def is_onnx(model: Any) -> bool:
    """Whether the ONNX host takes it; raises for what no host takes."""
    if type(model).__module__.startswith("onnx"):
        return True
    if isinstance(model, (str, Path)):
        path = Path(model)
        if path.suffix in (".pt2", ".onnx"):
            return path.suffix == ".onnx"
        if not path.exists():
            raise UnreadableModel(f"there is no file '{path}'", next_move="Check the path.")
        raise UnsupportedFormat(
            f"'{path.name}' is neither .onnx nor .pt2", next_move="Export with torch.export.save or torch.onnx.export."
        )
    if isinstance(model, (torch.nn.Module, torch.export.ExportedProgram)):
        return False
    raise UnsupportedFormat(
        f"a {type(model).__name__} is not a model",
        next_move="Give an nn.Module, ExportedProgram, GraphModule, onnx.ModelProto, or a path to .onnx or .pt2.",
    )
