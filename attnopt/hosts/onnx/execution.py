"""Running ONNX models with onnxruntime on torch tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from attnopt.hosts.onnx.writing import is_external

EXOTIC = {torch.bfloat16: torch.int16}  # numpy has no such type: the bits travel as another


def session(model: ir.Model) -> ort.InferenceSession:
    """A session with all of onnxruntime's own optimisations, on as many threads as torch has here.

    Threads do not spin, so that timings in turn are fair.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = ["CPUExecutionProvider"]
    if not is_external(model):
        return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=providers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="model.data")  # streamed from file to file
        return ort.InferenceSession(str(path), options, providers=providers)


def as_value(tensor: Tensor) -> ort.OrtValue:
    tensor = tensor.detach().contiguous()
    if tensor.dtype in EXOTIC:
        kind = ir.DataType.BFLOAT16
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(EXOTIC[tensor.dtype]).numpy(), int(kind))
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def as_tensor(value: ort.OrtValue) -> Tensor:
    if value.data_type() == "tensor(bfloat16)":
        return torch.from_dlpack(value._ortvalue).clone()
    return torch.from_numpy(value.numpy())


def runner(model: ir.Model) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
    """Named tensors in, the list of outputs out."""
    running = session(model)
    names = [i.name for i in running.get_inputs()]
    outputs = [o.name for o in running.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        feed = {name: as_value(inputs[name]) for name in names}
        return [as_tensor(v) for v in running.run_with_ort_values(outputs, feed)]

    return run
