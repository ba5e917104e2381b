"""The eager twin of prefill.py: the same walk over blocks of keys in plain PyTorch, for all heads of a block of queries at once.

    attention(q, k, v, "softmax scale(0.25) causal & window(20)", block_q=16, block_k=16)   ->   o [B, H, Q, E]

Slow and obvious: it visits the ranges that the kernel visits, masks where the kernel masks, rescales when the top moves and keeps
it where scores are bounded, so that a range that is too narrow shows here as a wrong number, without Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.codegen.skipped_tiles import skipped
from attnopt.codegen.triton.kernels.prefill_codes_eager import operands as rounded
from attnopt.codegen.triton.packed_sequences import sequences
from attnopt.codegen.triton.row_norms import NORMS, gains, is_static, normed
from attnopt.ir.ranges import Range, extreme, key_range
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.reference import query_offset
from attnopt.ir.spec import AttentionSpec, as_spec


@dataclass(frozen=True, kw_only=True)
class BlockGrid(Grid):
    """One block of queries beside one of keys: rows and columns are positions in the whole."""

    rows: Tensor
    columns: Tensor

    def index(self, name: str) -> Tensor:
        if name in ("q", "row"):
            return (self.rows + (self.offset if name == "q" else 0))[None, None, :, None]
        return self.columns[None, None, None, :] if name == "k" else super().index(name)


def attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec | str, *, block_q: int, block_k: int,
    limits: Mapping[str, float] | None = None, **operands: Tensor,
) -> Tensor:  # fmt: skip
    """q [B, H, Q, D], k [B, G, K, D], v [B, G', K, E] -> [B, H, Q, E], in their dtype. For specs that the kernel supports.

    limits: the largest magnitudes of gains, by name, where they are known.
    """
    parsed = as_spec(spec)
    heads, q_len, kv_len = q.shape[1], q.shape[2], k.shape[2]
    static = parsed.precision is None and is_static(parsed, q.shape[3], "float32", dict(limits or {}))
    q, k_norm = normalised(parsed, q, k, operands)
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    held = rounded(parsed, q, k, v)
    offset = query_offset(parsed, q_len, kv_len)
    scope, grain = key_range(parsed.mask), skipped(parsed.selection)
    if grain is not None and grain != (block_q, block_k):
        raise ValueError(f"values are skipped by blocks of {grain}, not of {(block_q, block_k)}")
    blocks = []
    for start in range(0, q_len, block_q):
        rows = torch.arange(start, min(start + block_q, q_len))
        b_top = q.new_full((q.shape[0], heads, len(rows), 1), -torch.inf)
        b_sum, b_o = torch.zeros_like(b_top), q.new_zeros((*b_top.shape[:3], v.shape[3]))

        def grid(columns: Tensor, rows: Tensor = rows) -> BlockGrid:
            return BlockGrid(q.shape[0], heads, q_len, kv_len, offset, rows=rows, columns=columns)

        for i, edge in visited(scope, offset + int(rows[0]), offset + int(rows[-1]), q_len, kv_len, block_k):
            columns = torch.arange(i * block_k, min((i + 1) * block_k, kv_len))
            chosen = on_list(parsed, rows, columns, operands)
            if chosen is not None and not chosen.any():
                continue
            b_s = scored(parsed, held.products(rows, columns) * k_norm[..., columns], grid(columns), operands)
            mask = parsed.mask if edge else scope.undecided
            if mask is not None:
                b_s = torch.where(evaluate(mask, grid(columns), operands).bool(), b_s, -torch.inf)
            if chosen is not None:
                b_s = torch.where(chosen, b_s, -torch.inf)
            b_new = torch.zeros_like(b_top) if static else torch.maximum(b_top, b_s.amax(-1, keepdim=True))
            b_safe = torch.where(b_new == -torch.inf, 0.0, b_new)
            b_p, b_decay = (b_s - b_safe).exp(), (b_top - b_safe).exp()
            b_sum, b_top = b_sum * b_decay + b_p.sum(-1, keepdim=True), b_new
            b_new_o = b_o * b_decay + held.weighed(b_p, columns)
            b_o = b_new_o if grain is None else torch.where(near(b_s, b_new, parsed), b_new_o, b_o)
        b_own = b_sum
        if parsed.sink is not None:
            b_sink = evaluate(parsed.sink.expr(0), grid(torch.zeros(1, dtype=torch.long)), operands).to(q.dtype).expand_as(b_top)
            b_new = torch.maximum(b_top, b_sink)
            b_own, b_o = b_sum * (b_top - b_new).exp(), b_o * (b_top - b_new).exp()
            b_sum = b_own + (b_sink - b_new).exp()
        averaged = parsed.empty_row == "mean" and parsed.sink is None and not parsed.mask is parsed.selection is None
        empty = held.v.mean(2, keepdim=True) + held.v_mean if averaged else torch.zeros_like(b_o)
        total = torch.where(b_sum == 0, 1.0, b_sum)
        blocks.append(torch.where(b_sum == 0, empty, b_o / total + held.v_mean * (b_own / total)))
    return torch.cat(blocks, 2)


def attention_packed(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, spec: AttentionSpec | str, *, block_q: int, block_k: int,
    **operands: Tensor,
) -> Tensor:  # fmt: skip
    """q [rows, H, D], k [keys, G, D], v [keys, G', E], starts [B + 1] -> [rows, H, E]: each sequence on its own."""
    o = q.new_zeros((*q.shape[:2], v.shape[2]))
    for one in sequences(as_spec(spec), q, k, v, q_starts, k_starts, operands):
        if one.k.shape[2] > 0:
            made = attention(one.q, one.k, one.v, spec, block_q=block_q, block_k=block_k, **one.operands)
            o[one.rows] = made[0].transpose(0, 1)
    return o


def normalised(spec: AttentionSpec, q: Tensor, k: Tensor, operands: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The queries with all factors of channels, and what is left for the scores: one over the norm of each key, [B, H, 1, K]."""
    norm, heads = spec.qk_norm, q.shape[1]
    ones = q.new_ones((1, 1, 1, k.shape[2]))
    if norm is None:
        return q, ones
    center = norm.word(0) == "layer" or norm.word("center") == "yes"

    def centred(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if center else x

    def inverse_norm(x: Tensor) -> Tensor:
        if NORMS[norm.word(0)] == "rms":
            return torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.number("eps"))
        return 1 / x.norm(dim=-1, keepdim=True).clamp(min=norm.number("eps"))

    if normed(norm, "q"):
        q = centred(q) * inverse_norm(centred(q))
    for side, name in gains(norm).items():
        count = heads if side == "q" else k.shape[1]
        q = q * operands[name].expand(count, q.shape[3]).repeat_interleave(heads // count, 0)[:, None]
    if not normed(norm, "k"):
        return q, ones
    return centred(q), inverse_norm(centred(k)).mT.repeat_interleave(heads // k.shape[1], 1)


def on_list(spec: AttentionSpec, rows: Tensor, columns: Tensor, operands: Mapping[str, Tensor]) -> Tensor | None:
    """Which pairs stand in tiles that are visited, [B | 1, H | 1, rows, columns]; None where there is no list."""
    clause = spec.selection
    if clause is None:
        return None
    return operands[clause.word("operand")].bool()[:, :, rows // clause.count(0)][..., columns // clause.count(1)]


def near(scores: Tensor, top: Tensor, spec: AttentionSpec) -> Tensor:
    """Whether the values of a block count: a row's largest score is less than `skip` below the largest that it has met."""
    high = scores.amax(-1, keepdim=True)
    fall = torch.where(high == -torch.inf, -torch.inf, high - top)
    assert spec.selection is not None
    return fall.amax(2, keepdim=True) > -spec.selection.number("skip")


def visited(scope: Range, q_first: int, q_last: int, q_len: int, kv_len: int, block_k: int) -> Iterator[tuple[int, bool]]:
    """The blocks of keys that a block of queries visits, each with whether it needs the whole mask."""

    def number(bounds: tuple[Expr, ...], op: str, otherwise: int) -> int:
        sizes = {"q_first": q_first, "q_last": q_last}
        return int(evaluate(extreme(op, bounds), Grid(1, 1, q_len, kv_len, sizes=sizes))) if bounds else otherwise

    first = max(number(scope.first, "max", 0), 0) // block_k
    end = max(-(-min(number(scope.end, "min", kv_len), kv_len) // block_k), first)
    leading = 0 if scope.leading is None else -(-min(number((scope.leading,), "min", 0), kv_len) // block_k)
    end, leading = max(end, leading), min(leading, first)
    inner_first = min(max(-(-number(scope.inner_first, "max", 0) // block_k), first), end)
    inner_end = min(max(min(number(scope.inner_end, "min", kv_len), kv_len) // block_k, inner_first), end)
    for i in (*range(leading), *range(first, end)):
        yield i, not inner_first <= i < inner_end


def scored(spec: AttentionSpec, scores: Tensor, grid: Grid, operands: dict[str, Tensor]) -> Tensor:
    """The score terms in their order."""
    from attnopt.ir.operand_terms import MODS

    for clause in spec.score:
        if clause.name == "softcap":
            scores = clause.number(0) * torch.tanh(scores / clause.number(0))
        elif clause.name == "mod":
            scores = MODS[clause.word(0)](scores)
        else:
            value = evaluate(clause.expr(0), grid, operands).to(scores.dtype)
            scores = scores * value if clause.name == "scale" else scores + value
    return scores
