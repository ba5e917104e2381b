"""The meaning of a spec: plain PyTorch, slow and obvious. Every kernel and every exact pass is checked against it.

    reference("softmax scale(0.125) causal", q, k, v)        q [B, Hq, Q, D], k [B, Hk, K, D], v [B, Hv, K, Dv] -> [B, Hq, Q, Dv]

It runs in the dtype of its inputs (give float64 for an oracle) and materialises the whole score matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.errors import InputMismatch
from attnopt.ir.clause import Clause
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.normalizers import NORMALIZERS, RowContext
from attnopt.ir.operand_terms import normalize_rows, rotate, round_to
from attnopt.ir.selections import SELECTIONS
from attnopt.ir.spec import AttentionSpec, as_spec

MODS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "square": torch.square,
    "silu": torch.nn.functional.silu,
    "exp": torch.exp,
    "log1p": torch.log1p,
}


@dataclass(frozen=True)
class Attended:
    """The output [B, Hq, Q, Dv], the weights [B, Hq, Q, K] and the log-sum-exp of the scores [B, Hq, Q]."""

    output: Tensor
    weights: Tensor
    lse: Tensor


def reference(spec: AttentionSpec | str, q: Tensor, k: Tensor, v: Tensor, **operands: Tensor) -> Tensor:
    """What `spec` computes on q, k, v and the operands that it loads (by name).

    q [B, Hq, Q, D], k [B, Hk, K, D], v [B, Hv, K, Dv]; returns [B, Hq, Q, Dv] in q's dtype. Raises InputMismatch where the
    shapes contradict the spec or each other, or an operand is missing.
    """
    return attend(spec, q, k, v, **operands).output


def attend(spec: AttentionSpec | str, q: Tensor, k: Tensor, v: Tensor, **operands: Tensor) -> Attended:
    """`reference` with the weights and the log-sum-exp beside the output."""
    spec = as_spec(spec)
    check_shapes(spec, q, k, v)
    batch, heads, q_len, _ = q.shape
    grid = Grid(batch, heads, q_len, k.shape[2], query_offset(spec, q_len, k.shape[2]), q.device)

    def value_of(expr: Expr) -> Tensor:
        result = evaluate(expr, grid, operands)
        return result.to(q.dtype) if result.dtype != torch.bool else result

    if spec.qk_norm is not None:
        q, k = (normalize_rows(x, spec.qk_norm, operands.get(f"{name}_norm")) for name, x in (("q", q), ("k", k)))
    if spec.position is not None:
        q = rotate(q, spec.position, torch.arange(q_len, device=q.device) + grid.offset)
        k = rotate(k, spec.position, torch.arange(grid.kv_len, device=q.device))
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    if spec.precision is not None:
        q, k, v = (round_to(x, spec.precision, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    if spec.cache is not None:
        k, v = (round_to(x, spec.cache, None) for x in (k, v))
    if spec.value_scale is not None:
        v = v * value_of(spec.value_scale.args[0]).transpose(-1, -2)  # type: ignore[arg-type]

    scores = q @ k.transpose(-1, -2)
    for clause in spec.score:
        scores = apply_score(clause, scores, value_of)
    allowed = torch.ones((batch, heads, q_len, grid.kv_len), dtype=torch.bool, device=q.device)
    if spec.mask is not None:
        allowed = allowed & evaluate(spec.mask, grid, operands).bool()
    visible = allowed
    if spec.selection is not None:
        visible = allowed & SELECTIONS[spec.selection.name](spec.selection, q, k, scores, allowed, operands)
    sink = value_of(spec.sink.args[0]).expand(batch, heads, q_len, 1) if spec.sink is not None else None  # type: ignore[arg-type]

    row = RowContext(spec, q, k, v, scores, visible, sink, value_of)
    weights, output = NORMALIZERS[spec.normalizer.name](row)
    if spec.precision is not None:
        output = round_to(weights, spec.precision, "p") @ v
    if spec.correction is not None:
        output = delta_correction(spec, output, row, allowed)
    masked = scores.masked_fill(~visible, -torch.inf)
    lse = torch.logsumexp(masked if sink is None else torch.cat([masked, sink], -1), -1)
    return Attended(output, weights, lse)


def apply_score(clause: Clause, scores: Tensor, value_of) -> Tensor:  # type: ignore[no-untyped-def]
    argument = clause.args[0]
    if clause.name == "softcap":
        return float(argument) * torch.tanh(scores / float(argument))  # type: ignore[arg-type]
    if clause.name == "mod":
        return MODS[str(argument)](scores)
    return scores * value_of(argument) if clause.name == "scale" else scores + value_of(argument)


def delta_correction(spec: AttentionSpec, output: Tensor, row: RowContext, allowed: Tensor) -> Tensor:
    """Add to each block of rows what its first row lost: o[i+u] + (dense[i] - sparse[i]); the last rows are dense.

    Source: "Delta Attention" (dense rows every gamma queries, difference carried forward within the block).
    """
    gamma = int(spec.correction.args[0])  # type: ignore[union-attr, arg-type]
    dense = NORMALIZERS[spec.normalizer.name](replace(row, visible=allowed))[1]
    q_len = output.shape[2]
    first = torch.arange(q_len, device=output.device) // gamma * gamma
    corrected = output + (dense - output)[:, :, first]
    tail = max(0, q_len - (q_len % gamma + max(128, gamma)))
    return torch.cat([corrected[:, :, :tail], dense[:, :, tail:]], 2)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, Hk, K, D] -> [B, H, K, D]: query head i reads head i * Hk // H."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def query_offset(spec: AttentionSpec, q_len: int, kv_len: int) -> int:
    if spec.offset is None:
        return 0
    return int(evaluate(spec.offset.args[0], Grid(1, 1, q_len, kv_len)))  # type: ignore[arg-type]


def check_shapes(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise InputMismatch where q, k, v do not fit the spec or one another."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise InputMismatch(f"{name} has {x.ndim} dimensions", where=str(tuple(x.shape)), next_move="Give [B, H, L, D].")
    problems = [
        (q.shape[0] != k.shape[0] or k.shape[0] != v.shape[0], "q, k and v differ in batch"),
        (k.shape[2] != v.shape[2], "k and v differ in length"),
        (q.shape[3] != k.shape[3], "q and k differ in width"),
        (bool(q.shape[1] % k.shape[1] or q.shape[1] % v.shape[1]), "query heads are no multiple of key or value heads"),
    ]
    if spec.head_counts is not None:
        problems.append((spec.head_counts != (q.shape[1], k.shape[1], v.shape[1]), f"the spec says {spec.heads}"))
    if spec.width is not None:
        widths = (spec.width.args[0], spec.width.args[-1])
        problems.append((widths != (q.shape[3], v.shape[3]), f"the spec says {spec.width}"))
    for wrong, message in problems:
        if wrong:
            shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
            raise InputMismatch(message, where=shapes, next_move="q is [B, Hq, Q, D], k [B, Hk, K, D], v [B, Hv, K, Dv].")
