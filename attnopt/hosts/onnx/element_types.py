"""ONNX element types as torch names, and ONNX tensors as torch tensors."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

NAMES = {
    ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64", ir.DataType.INT32: "int32", ir.DataType.INT16: "int16", ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8", ir.DataType.BOOL: "bool",
}  # fmt: skip
TYPES = {name: kind for kind, name in NAMES.items()}


def dtype_name(kind: ir.DataType | None) -> str:
    """ "float32" for FLOAT; "" for what torch has no name for."""
    return "" if kind is None else NAMES.get(kind, "")


def as_torch(tensor: ir.TensorProtocol) -> Tensor:
    """A copy of the data, so that external files may be closed."""
    array = tensor.numpy()
    if tensor.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def as_onnx(tensor: Tensor, name: str) -> ir.TensorProtocol:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.int16).numpy().view(ir.DataType.BFLOAT16.numpy())
        return ir.Tensor(bits, dtype=ir.DataType.BFLOAT16, name=name)
    return ir.Tensor(tensor.numpy(), name=name)
