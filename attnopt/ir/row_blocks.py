"""The reference, a block of query rows at a time: the same meaning without a whole score matrix.

    for block in attended(spec, q, k, v, operands): block.weights [B, H, rows, K], block.output [B, H, rows, E]

Only where a row's weights depend on no other row; `row_local` says what else stands in the way. There the one block is everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from attnopt.ir.evaluate import Grid
from attnopt.ir.reference import check_shapes, finish, query_offset, reference, rows_of
from attnopt.ir.rows import Rows
from attnopt.ir.spec import AttentionSpec

NORMALIZERS = ("softmax", "sigmoid", "signed_softmax", "zscore", "polynomial", "weights")
SCORE_TERMS = ("scale", "softcap", "add", "add_square", "mod", "mix")
WHOLE_SLOTS = ("pairing", "through", "selection", "correction", "plus", "precision")


@dataclass(frozen=True, eq=False)
class Block:
    """Query rows first … of all heads and samples: weights and what is visible [B, H, rows, K], output [B, H, rows, E].

    positions [rows, 1]: absolute positions of the queries.
    """

    first: int
    rows: Rows
    weights: Tensor
    output: Tensor

    @property
    def visible(self) -> Tensor:
        return self.rows.visible

    @property
    def positions(self) -> Tensor:
        return self.rows.q_position


def row_local(spec: AttentionSpec) -> str:
    """Why the rows of this attention cannot be computed on their own; empty where they can."""
    if spec.normalizer.name not in NORMALIZERS:
        return f"{spec.normalizer} reads more than one row"
    for clause in spec.score:
        if clause.name not in SCORE_TERMS:
            return f"{clause} reads more than one score of a row"
    for slot, clause in spec.clauses:
        long_norm = slot == "qk_norm" and clause.word(0) == "longest"
        if slot in WHOLE_SLOTS or long_norm or clause.name == "weight_conv":
            return f"{clause} reads more than one row"
    return ""


def attended(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Mapping[str, Tensor],
    *,
    sizes: Mapping[str, int] | None = None,
    elements: int = 2**23,
) -> Iterator[Block]:
    """Blocks of rows with at most `elements` scores each (at least one row); one block of all rows where `row_local` says why.

    Shapes and errors are those of `reference`. sizes: lengths by name that the spec asks for besides q and k.
    """
    check_shapes(spec, q, k, v)
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    step = q_len if row_local(spec) else max(1, elements // max(1, batch * heads * kv_len))
    offset = query_offset(spec, q_len, kv_len)
    lengths = {**(sizes or {}), "q": q_len, "k": kv_len}
    for first in range(0, q_len, step):
        part = q[:, :, first : first + step]
        grid = Grid(batch, heads, part.shape[2], kv_len, offset, q.device, lengths, first_row=first)
        rows = rows_of(spec, part, k, v, operands, None if row_local(spec) else grid)
        found = finish(rows)
        output = found.output
        if spec.gate is not None:
            output = output * rows.call.row_value(spec.gate.expr(0))
        for clause in spec.plus:
            given = (x if clause.operand(n) is None else rows.call.operand(clause, n) for n, x in (("q", q), ("k", k), ("v", v)))
            output = output + rows.call.row_value(clause.expr(0)) * reference(clause.spec(1), *given, **operands)
        yield Block(first, rows, found.weights, output)
