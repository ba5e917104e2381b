"""Delta correction around any sparse attention: a few dense rows say what sparsity shifts, and their neighbours are shifted back.

    o_s = sparse(all rows)      o_d = dense(rows 0, g, 2g, …)      o[i + u] = o_s[i + u] + o_d[i] - o_s[i],  0 <= u < g,  i a multiple of g

The last rows, which steer what is generated, are dense. Dense rows are a kernel of their own, in which a query stands at g times its
number: 1 / g of the dense cost. It helps where neighbouring rows lose alike, as real activations do; on independent random queries
and keys the differences of neighbours have nothing in common, and nothing is gained.

Source: "Delta Attention".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnopt.codegen.listed import Run
from attnopt.ir.at_end import AT_END
from attnopt.ir.clause import Clause
from attnopt.ir.expr import Expr, Index, Size, apply, substitute, walk
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

SUBSTITUTED = ("scale", "add")


def refuses(spec: AttentionSpec) -> Refusal | None:
    """None where rows can be computed apart from their neighbours, and stand where their number says."""
    if spec.correction is None:
        return Refusal("there is nothing to correct", spec)
    if spec.offset is not None:
        return Refusal("only a whole prompt is corrected: its first query stands at position 0", spec.offset)
    exprs = [c.expr(0) for c in spec.score if c.name in SUBSTITUTED] + [m for m in (spec.mask, dense_mask(spec)) if m is not None]
    if any(Size("q") in walk(e) for e in exprs):
        return Refusal("it reads the number of queries, which differs for the dense rows", spec)
    return None


def dense_mask(spec: AttentionSpec) -> Expr | None:
    assert spec.correction is not None
    return spec.correction.expr_or_none("dense") or spec.mask


def dense(spec: AttentionSpec) -> AttentionSpec:
    """What the sparse attention stands for."""
    return spec.with_(mask=dense_mask(spec), selection=None, correction=None)


def every(spec: AttentionSpec, gamma: int) -> AttentionSpec:
    """The spec of rows 0, gamma, 2 gamma, …: a query stands at gamma times its number."""
    return placed(spec, {name: apply("mul", Index(name), gamma) for name in ("q", "row")})


def last_rows(spec: AttentionSpec) -> AttentionSpec:
    """The spec of the last rows of as many queries as keys, whatever their number."""
    return placed(spec, {"row": Index("q")}).with_(offset=AT_END)


def placed(spec: AttentionSpec, names: dict[str, Expr]) -> AttentionSpec:
    score = tuple(Clause(c.name, (substitute(c.expr(0), names),)) if c.name in SUBSTITUTED else c for c in spec.score)
    sink = None if spec.sink is None else Clause("sink", (substitute(spec.sink.expr(0), names),))
    return spec.with_(score=score, sink=sink, mask=None if spec.mask is None else substitute(spec.mask, names))


def run_corrected(
    sparse: Run, run: Run, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Tensor]
) -> Tensor:
    """The corrected output [B, H, Q, E]. sparse: computes the spec without its correction; run: computes a dense one."""
    clause = spec.correction
    assert clause is not None
    gamma, length = max(1, clause.count(0)), q.shape[2]
    whole = dense(spec)
    tail = max(0, length - (length % gamma + max(clause.count("tail"), gamma)))
    end = run(last_rows(whole), q[:, :, tail:], k, v, operands)
    if tail == 0:
        return end  # type: ignore[no-any-return]
    found = sparse(spec.with_(correction=None), q, k, v, operands)[:, :, :tail]  # all rows: they choose together
    rows = run(every(whole, gamma), q[:, :, :tail:gamma], k, v, operands)
    shift = rows - found[:, :, ::gamma]
    return torch.cat([found + shift.repeat_interleave(gamma, 2)[:, :, :tail], end], 2)
