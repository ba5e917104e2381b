"""Whether operands are as large as a spec reads them: a kernel does not look, and would read what stands beside them in memory.

    load(bias, b, h, row, k), bias [2, 4, 8, 7], 8 queries and 8 keys   ->   InputMismatch: operand 'bias' of shape … is read from 0 to 7 …
    blocks(64, 64, operand=list), list [1, 1, 3, 4], 256 queries        ->   InputMismatch: 'list' is [1, 1, 3, 4], not [1|B, 1|H, 4, 4]

Indices are looked at where each of b, h, q and k is first or last: that is where those that grow or fall are outermost. What is read at a
number that another operand holds is not known before, and is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attnopt.codegen.expressions import loads_of
from attnopt.codegen.prefill_form import expressions
from attnopt.errors import InputMismatch
from attnopt.ir.clause import Clause
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Load
from attnopt.ir.reference import query_offset
from attnopt.ir.spec import AttentionSpec


def check_operands(
    spec: AttentionSpec, batch: int, heads: int, q_len: int, kv_len: int, shapes: Mapping[str, Sequence[int]]
) -> None:
    """Raises InputMismatch for an operand that is read outside of its shape, or has another number of dimensions."""
    offset = query_offset(spec, q_len, kv_len)
    ends = Grid(batch, heads, q_len, kv_len, offset, q_step=max(1, q_len - 1), k_step=max(1, kv_len - 1))
    for load in dict.fromkeys(load for expr in expressions(spec) for load in loads_of(expr)):
        check_load(load, ends, shapes[load.operand])
    if spec.selection is not None:
        check_list(spec.selection, ends, shapes[str(spec.selection.operand("operand"))])


def check_load(load: Load, ends: Grid, shape: Sequence[int]) -> None:
    if len(shape) != len(load.indices):
        raise InputMismatch(
            f"operand '{load.operand}' is {list(shape)}, and is read by {len(load.indices)} indices",
            where=str(load),
            next_move="Give it that many dimensions, or write the load with other indices.",
        )
    for axis, index in enumerate(load.indices):
        if any(loads_of(index)):
            continue
        at = evaluate(index, ends)
        low, high = (int(at.min()), int(at.max())) if at.numel() else (0, -1)
        if low < 0 or high >= shape[axis]:
            raise InputMismatch(
                f"operand '{load.operand}' of shape {list(shape)} is read from {low} to {high} along dimension {axis}",
                where=str(load),
                next_move="Give a larger operand: of one that repeats, .expand(…) makes no copy.",
            )


def check_list(selection: Clause, ends: Grid, shape: Sequence[int]) -> None:
    rows, keys = (-(-length // selection.count(at)) for at, length in enumerate((ends.q_len, ends.kv_len)))
    fits = len(shape) == 4 and shape[0] in (1, ends.batch) and shape[1] in (1, ends.heads) and tuple(shape[2:]) == (rows, keys)
    if not fits:
        raise InputMismatch(
            f"operand '{selection.operand('operand')}' is {list(shape)}, not [1 or {ends.batch}, 1 or {ends.heads}, {rows}, {keys}]",
            where=f"{selection}, {ends.q_len} queries, {ends.kv_len} keys",
            next_move="Say of each block of queries and each block of keys whether it is visited.",
        )
