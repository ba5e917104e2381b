"""How operands come into a kernel: a buffer each, of any strides, named after the operand.

bias [B, H, Q, K]   ->   bias = T.match_buffer(p_bias, (n_bias_0, …), "float32", strides=(s_bias_0, …))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attnopt.codegen.expressions import plain_name
from attnopt.codegen.tvm.expressions import RESERVED


def buffer_name(operand: str) -> str:
    return plain_name(operand, RESERVED)


def buffer_lines(operands: Iterable[str], ranks: Mapping[str, int], dtypes: Mapping[str, str]) -> str:
    """The statements that declare lengths and strides and match the arguments p_…"""
    lines = []
    for operand in operands:
        name, rank = buffer_name(operand), range(ranks[operand])
        lengths, steps = ([f"{letter}_{name}_{at}" for at in rank] for letter in "ns")
        if rank:
            lines.append(f"    {', '.join([*lengths, *steps])} = {', '.join(['T.int64()'] * 2 * len(rank))}\n")
        shape, strides = (f"({', '.join(names)}{',' * (len(rank) == 1)})" for names in (lengths, steps))
        lines.append(f'    {name} = T.match_buffer(p_{name}, {shape}, "{dtypes[operand]}", strides={strides})\n')
    return "".join(lines)
