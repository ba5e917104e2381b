"""Linear layers and tables whose weights stay in few bits, by onnxruntime's own operators.

MatMul(x, W)   ->   com.microsoft.MatMulNBits(x, codes, steps, zero points)               Gemm(x, W, b)   ->   the same, Add(b)
Gather(T, i)   ->   com.microsoft.GatherBlockQuantized(codes, i, steps, zero points)      rows of tables, which may be those of a layer

Codes stand in blocks of a power of two of at least 16 inputs, each with a step: a step for a whole row is repeated. Codes of a width
that the operator has no kernel for (3, 5, 6, 7) stand in the next that it has. Levels in the middle of their bins are half a step
above whole codes:  x (C - m + 1/2)' s  =  x (C - m)' s + (sums of x over each block) (s / 2)'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from attnopt.hosts.onnx.int8 import Writer
from attnopt.hosts.onnx.places import Names
from attnopt.ir.site import Refusal
from attnopt.rounding.bit_packing import packed, unpacked
from attnopt.rounding.rounded_weight import RoundedWeight
from attnopt.rounding.weight_format import WeightFormat

DOMAIN = "com.microsoft"
LAYER = "attnopt.layer"  # metadata of a node: the name of the layer that it was
WIDTHS = (2, 4, 8)  # bits for which the operator has kernels
BLOCKS = (128, 64, 32, 16)
INT8_INPUTS, FLOAT_INPUTS = (
    4,
    1,
)  # accuracy_level: x is rounded to 8 bits by blocks, or not; without it 8-bit weights have no fast kernel


def refusal(format: WeightFormat, inputs: int) -> Refusal | None:
    """None where the operator can hold rows of so many inputs so."""
    if format.group:
        power = format.group & -format.group == format.group
        return (
            None if power and format.group >= 16 else Refusal(f"blocks of {format.group}: onnxruntime has powers of two from 16")
        )
    return None if inputs % BLOCKS[-1] == 0 else Refusal(f"rows of {inputs} inputs are no whole number of blocks of {BLOCKS[-1]}")


def refuses_rows(format: WeightFormat) -> Refusal | None:
    """None where a look-up can read its rows from what MatMulNBits holds."""
    crossed = format.zeros and format.bits < WIDTHS[-1]
    said = f"zero points of {format.bits} bits are packed across blocks, where a look-up reads them one by one"
    return Refusal(said) if crossed else None


@dataclass(frozen=True)
class Stored:
    """The constants of a layer: codes [out, blocks, bytes], steps [out, blocks], zero points or None, and their widths."""

    codes: ir.Value
    steps: ir.Value
    zeros: ir.Value | None
    block: int
    bits: int


def store_rounded(
    model: ir.Model,
    node: ir.Node,
    weight: RoundedWeight,
    names: Names,
    written: list[ir.Node],
    stored: dict[int, Stored] | None = None,
    level: int = INT8_INPUTS,
) -> ir.Value:
    """Write the layer in place of a MatMul or Gemm node; `weight` is what it multiplies by, as [out, in].

    stored: filled with what look-ups of the same rounded weight can read, by its identity.
    """
    model.opset_imports.setdefault(DOMAIN, 1)
    write = Writer(model, node, names, written)
    x, output = node.inputs[0], node.outputs[0]
    assert x is not None
    alpha, beta = (1.0 if (a := node.attributes.get(n)) is None else a.as_float() for n in ("alpha", "beta"))
    codes, steps, zeros, block, bits = blocked(weight)
    steps = steps * alpha
    held = Stored(write.constant(codes), write.constant(steps), None if zeros is None else write.constant(zeros), block, bits)
    inputs = [x, held.codes, held.steps, *([] if held.zeros is None else [held.zeros])]
    sizes = {"K": weight.shape[1], "N": weight.shape[0], "bits": bits, "block_size": block, "accuracy_level": level}
    (result,) = write.node("MatMulNBits", inputs, [ir.DataType.FLOAT], domain=DOMAIN, **sizes)
    between = isinstance(weight.zeros, float) and not weight.zeros.is_integer()
    if not between and alpha == 1.0:
        written[-1].metadata_props[LAYER] = node.name or ""
        if stored is not None:
            stored[id(weight)] = held
    if isinstance(weight.zeros, float) and between:
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


def stored_codes(model: ir.Model, formats: Mapping[str, WeightFormat]) -> dict[str, dict[str, Tensor]]:
    """What `store_rounded` wrote for layers of these names, as `RoundedWeight.arrays`.

    Absent are those that are not there, or that stand otherwise than they were given: with a factor, or levels between codes.
    """
    found = {}
    for node in model.graph:
        name = node.metadata_props.get(LAYER, "")
        if name in formats and all(v is None or v.const_value is not None for v in node.inputs[1:]):
            found[name] = read_codes(node, formats[name]).arrays()
    return found


def read_codes(node: ir.Node, format: WeightFormat) -> RoundedWeight:
    """The inverse of `blocked`."""
    held = [
        torch.from_numpy(v.const_value.numpy().copy()) for v in node.inputs[1:] if v is not None and v.const_value is not None
    ]
    inputs, block, bits = (node.attributes[name].as_int() for name in ("K", "block_size", "bits"))
    count = inputs // block
    each = count // format.groups(inputs)
    codes, steps = unpacked(held[0], bits, block).flatten(1), held[1].reshape(-1, count)[:, ::each].contiguous()
    if format.zeros:
        return RoundedWeight(format, codes, steps, unpacked(held[2].reshape(len(codes), -1), bits, count)[:, ::each].float())
    return RoundedWeight(format, codes - (2 ** (bits - 1) - format.middle), steps, float(format.middle))


def store_table(
    model: ir.Model, node: ir.Node, table: RoundedWeight, names: Names, written: list[ir.Node], stored: dict[int, Stored]
) -> ir.Value:
    """Write the look-up in place of a Gather node along rows; `table` is what it looks up in, [rows, channels].

    stored: of layers; where one holds this very table, its codes are read.
    """
    model.opset_imports.setdefault(DOMAIN, 1)
    write = Writer(model, node, names, written)
    ids, output = node.inputs[1], node.outputs[0]
    assert ids is not None
    if id(table) in stored:
        return write.instead(looked_up(write, ids, stored[id(table)], table.shape[1]), output)
    codes, steps, zeros, block, bits = blocked(
        table, table.format.group or max(BLOCKS[-1], 1 << (table.shape[1] - 1).bit_length())
    )
    inputs = [write.constant(codes.flatten(1)), ids, write.constant(steps)]
    if zeros is not None:
        inputs.append(write.constant(zeros))
    sizes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    (result,) = write.node("GatherBlockQuantized", inputs, [ir.DataType.FLOAT], domain=DOMAIN, **sizes)
    return write.instead(result, output)


def looked_up(write: Writer, ids: ir.Value, held: Stored, channels: int) -> ir.Value:
    """Rows [..., channels] of the codes of a layer: GatherBlockQuantized along blocks, which its codes keep apart."""
    last = write.constant(torch.tensor([2]))
    columns = [
        write.node("Unsqueeze", [v, last], [kind])[0]
        for v, kind in ((held.steps, ir.DataType.FLOAT), (held.zeros, ir.DataType.UINT8))
        if v is not None
    ]
    sizes = {"bits": held.bits, "block_size": held.block, "gather_axis": 0, "quantize_axis": 2}
    (rows,) = write.node("GatherBlockQuantized", [held.codes, ids, *columns], [ir.DataType.FLOAT], domain=DOMAIN, **sizes)
    (lengths,) = write.node("Shape", [ids], [ir.DataType.INT64])
    (shape,) = write.node("Concat", [lengths, write.constant(torch.tensor([channels]))], [ir.DataType.INT64], axis=0)
    return write.node("Reshape", [rows, shape], [ir.DataType.FLOAT])[0]


def blocked(weight: RoundedWeight, width: int = 0) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """(codes uint8 [out, blocks, bytes], steps [out, blocks], zero points or None, block, bits) as the operator reads them.

    width: of blocks; of whole rows that of a look-up may be wider than the row, and the step then stands once.
    """
    inputs, format = weight.shape[1], weight.format
    bits = next(b for b in WIDTHS if b >= format.bits)
    block = width or format.group or next(b for b in BLOCKS if inputs % b == 0)
    count = -(-inputs // block)
    each = count // format.groups(inputs)
    steps = weight.steps.repeat_interleave(each, 1)
    middle = 2 ** (bits - 1)
    if isinstance(weight.zeros, Tensor):
        points = weight.zeros.repeat_interleave(each, 1).to(torch.uint8)
        return packed(weight.codes.unflatten(1, (count, -1)), bits), steps, packed(points, bits), block, bits
    codes = weight.codes + (middle - math.ceil(weight.zeros))
    return packed(codes.unflatten(1, (count, -1)), bits), steps, None, block, bits
