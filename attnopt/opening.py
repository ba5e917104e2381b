"""Open whatever the user gave: choose the host, name the example inputs, read calibration data."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnopt.errors import InputMismatch, UnreadableModel, UnsupportedFormat
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.dims import solved


@dataclass(frozen=True)
class Opened:
    """A model in its host, with named example inputs (None where there are none)."""

    host: FxHost | OnnxHost
    inputs: Mapping[str, Tensor] | None
    runtime: str
    opset: int

    @property
    def output_name(self) -> str:
        return self.host.output_names[0] if self.host.output_names else ""

    def symbols(self) -> dict[str, int]:
        """Values of the graph's symbolic sizes at the example inputs."""
        sizes: dict[str, int] = {}
        for value in self.host.graph.inputs:
            tensor = (self.inputs or {}).get(value.name)
            if tensor is None or value.shape is None:
                continue
            for dim, size in zip(value.shape, tensor.shape, strict=False):
                if (found := solved(dim, int(size))) is not None:
                    sizes[found[0]] = found[1]
        return sizes

    def batches(self, calibration: Any) -> list[Mapping[str, Tensor]]:
        """Calibration inputs as named tensors, checked against the model's inputs."""
        if calibration is None:
            return []
        if isinstance(calibration, (str, Path)):
            calibration = read_npz(Path(calibration), [spec.name for spec in self.host.input_specs])
        if isinstance(calibration, Mapping) or not isinstance(calibration, Sequence) or not calibration:
            raise InputMismatch(
                "calibration is not a non-empty list of inputs",
                where=type(calibration).__name__,
                next_move="Give a list of the same kind of inputs as example_inputs, or the path of an .npz file.",
            )
        return [self.host.named_inputs(batch) for batch in calibration]


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
    captured = capture(model, example_inputs, dynamic_shapes)
    fx = FxHost.from_captured(captured)
    return Opened(fx, fx.example_inputs(), "torch", 0)


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


def read_npz(path: Path, names: Sequence[str]) -> list[dict[str, Tensor]]:
    """One array per input name, cut along the first axis into batches: [samples, batch, …], or [samples, …] of batch one."""
    try:
        archive = np.load(path)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array, and no name says which input that is")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as failure:
        raise InputMismatch(
            f"cannot read calibration data: {failure}",
            where=str(path),
            next_move="Save it with numpy.savez(path, input_name=array, …).",
        ) from None
    missing = [n for n in names if n not in arrays]
    if missing:
        raise InputMismatch(
            f"calibration data lacks {', '.join(missing)}",
            where=str(path),
            next_move=f"It holds {', '.join(arrays) or 'nothing'}; the model reads {', '.join(names)}.",
        )
    counts = {name: len(arrays[name]) for name in names}
    if len(set(counts.values())) != 1 or not next(iter(counts.values()), 0):
        raise InputMismatch(
            "calibration arrays differ in their number of samples", where=str(counts), next_move="Make them equal."
        )
    return [{name: torch.from_numpy(arrays[name][i : i + 1]) for name in names} for i in range(next(iter(counts.values())))]
