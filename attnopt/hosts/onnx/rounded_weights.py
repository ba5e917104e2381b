"""Linear layers whose weights stay in few bits, by onnxruntime's own operator.

MatMul(x, W)   ->   com.microsoft.MatMulNBits(x, codes, steps, zero points)               Gemm(x, W, b)   ->   the same, Add(b)

Codes stand in blocks of a power of two of at least 16 inputs, each with a step: a step for a whole row is repeated. Codes of a width
that the operator has no kernel for (3, 5, 6, 7) stand in the next that it has. Levels in the middle of their bins are half a step
above whole codes:  x (C - m + 1/2)' s  =  x (C - m)' s + (sums of x over each block) (s / 2)'.
"""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
from torch import Tensor

from attnopt.hosts.onnx.int8 import Writer
from attnopt.hosts.onnx.places import Names
from attnopt.ir.site import Refusal
from attnopt.rounding.bit_packing import packed
from attnopt.rounding.rounded_weight import RoundedWeight
from attnopt.rounding.weight_format import WeightFormat

DOMAIN = "com.microsoft"
WIDTHS = (2, 4, 8)  # bits for which the operator has kernels
BLOCKS = (128, 64, 32, 16)
INT8_INPUTS = 4  # accuracy_level: x is rounded to 8 bits, a block at a time; without it 8-bit weights have no fast kernel


def refusal(format: WeightFormat, inputs: int) -> Refusal | None:
    """None where the operator can hold rows of so many inputs so."""
    if format.group:
        power = format.group & -format.group == format.group
        return (
            None if power and format.group >= 16 else Refusal(f"blocks of {format.group}: onnxruntime has powers of two from 16")
        )
    return None if inputs % BLOCKS[-1] == 0 else Refusal(f"rows of {inputs} inputs are no whole number of blocks of {BLOCKS[-1]}")


def store_rounded(model: ir.Model, node: ir.Node, weight: RoundedWeight, names: Names, written: list[ir.Node]) -> ir.Value:
    """Write the layer in place of a MatMul or Gemm node; `weight` is what it multiplies by, as [out, in]."""
    model.opset_imports.setdefault(DOMAIN, 1)
    write = Writer(model, node, names, written)
    x, output = node.inputs[0], node.outputs[0]
    assert x is not None
    alpha, beta = (1.0 if (a := node.attributes.get(n)) is None else a.as_float() for n in ("alpha", "beta"))
    codes, steps, zeros, block, bits = blocked(weight)
    steps = steps * alpha
    inputs = [x, write.constant(codes), write.constant(steps)]
    if zeros is not None:
        inputs.append(write.constant(zeros))
    sizes = {"K": weight.shape[1], "N": weight.shape[0], "bits": bits, "block_size": block, "accuracy_level": INT8_INPUTS}
    (result,) = write.node("MatMulNBits", inputs, [ir.DataType.FLOAT], domain=DOMAIN, **sizes)
    if isinstance(weight.zeros, float) and not weight.zeros.is_integer():
        sums = torch.eye(weight.shape[1] // block).repeat_interleave(block, 0)
        (summed,) = write.node("MatMul", [x, write.constant(sums)], [ir.DataType.FLOAT])
        half = (math.ceil(weight.zeros) - weight.zeros) * steps.T
        (shifted,) = write.node("MatMul", [summed, write.constant(half.contiguous())], [ir.DataType.FLOAT])
        (result,) = write.node("Add", [result, shifted], [ir.DataType.FLOAT])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        if beta != 1.0:
            (bias,) = write.node("Mul", [bias, write.constant(torch.tensor(beta))], [ir.DataType.FLOAT])
        (result,) = write.node("Add", [result, bias], [ir.DataType.FLOAT])
    return write.instead(result, output)


def blocked(weight: RoundedWeight) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """(codes uint8 [out, blocks, bytes], steps [out, blocks], zero points or None, block, bits) as the operator reads them."""
    inputs, format = weight.shape[1], weight.format
    bits = next(b for b in WIDTHS if b >= format.bits)
    block = format.group or next(b for b in BLOCKS if inputs % b == 0)
    count = inputs // block
    each = count // format.groups(inputs)
    steps = weight.steps.repeat_interleave(each, 1)
    middle = 2 ** (bits - 1)
    if isinstance(weight.zeros, Tensor):
        points = weight.zeros.repeat_interleave(each, 1).to(torch.uint8)
        return packed(weight.codes.unflatten(1, (count, block)), bits), steps, packed(points, bits), block, bits
    codes = weight.codes + (middle - math.ceil(weight.zeros))
    return packed(codes.unflatten(1, (count, block)), bits), steps, None, block, bits
