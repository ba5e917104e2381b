"""The meaning of a spec: plain PyTorch, slow and obvious. Every kernel and every exact pass is checked against it.

    reference("softmax scale(0.125) causal", q, k, v)        q [B, Hq, Q, D], k [B, Hk, K, D], v [B, Hv, K, Dv] -> [B, Hq, Q, Dv]

It runs in the dtype of its inputs (give float64 for an oracle) and materialises the whole score matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.errors import InputMismatch
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Term, conjuncts
from attnopt.ir.normalizers import NORMALIZERS, products, recurrent_reads
from attnopt.ir.operand_terms import (
    angles_of,
    apply_score_terms,
    convolve,
    mix_weights,
    normalize_rows,
    paired,
    repeat_heads,
    rotate,
)
from attnopt.ir.rounded_products import weighted_values
from attnopt.ir.rows import Call, Rows
from attnopt.ir.selections import SELECTIONS
from attnopt.ir.spec import AttentionSpec, as_spec
from attnopt.ir.storage import round_cache


@dataclass(frozen=True)
class Attended:
    """The output [B, Hq, Q, Dv], the weights [B, Hq, Q, K] and the log-sum-exp of the scores [B, Hq, Q].

    Weights and log-sum-exp are those of the main attention, without gate and `plus`; with `value_decay` there is no one weight
    per key, and they are NaN.
    """

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
    check_shared(spec, q, k, v)
    rows = rows_of(spec, q, k, v, operands)
    found = finish(rows)
    output, call = found.output, rows.call
    if spec.gate is not None:
        output = output * call.row_value(spec.gate.expr(0))
    for clause in spec.plus:
        given = (x if clause.operand(name) is None else call.operand(clause, name) for name, x in (("q", q), ("k", k), ("v", v)))
        output = output + call.row_value(clause.expr(0)) * reference(clause.spec(1), *given, **operands)
    return replace(found, output=output)


def rows_of(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Tensor], grid: Grid | None = None
) -> Rows:
    """Everything up to the normaliser: what is attended to, normalised, rotated, rounded, scored, masked and selected.

    grid: where the rows of q stand, if not on a grid of their own (a block of the rows of a longer attention).
    """
    k, v = sources(spec, q, k, v, operands)
    batch, heads, q_len, _ = q.shape
    grid = grid or Grid(batch, heads, q_len, k.shape[2], query_offset(spec, q_len, k.shape[2]), q.device)
    call = Call(spec, grid, operands, q.dtype)
    if spec.qk_norm is not None:
        q, k = (normalize_rows(call, x, spec.qk_norm, side) for x, side in ((q, "q"), (k, "k")))
    key_heads = head_map(call, heads, k.shape[1])
    v = repeat_heads(v, key_heads if v.shape[1] == k.shape[1] else even_heads(heads, v.shape[1], q.device))
    k = repeat_heads(k, key_heads)
    if spec.position is not None and spec.position.word("on") == "rows":
        q, k = (rotate(x, spec.position, angles_of(call, spec.position, side)) for x, side in ((q, "q"), (k, "k")))
    if spec.position is not None and spec.position.word("values") == "yes":
        v = rotate(v, spec.position, angles_of(call, spec.position, "k"))
    if spec.cache is not None:
        k, v = (round_cache(call, x, spec.cache, side) for x, side in ((k, "k"), (v, "v")))
    visible = torch.ones((batch, heads, q_len, grid.kv_len), dtype=torch.bool, device=q.device)
    if spec.mask is not None:
        visible = call.mask(spec.mask)
    scores, summed = (x if x is None else apply_score_terms(call, x, q, k, visible) for x in products(call, q, k))
    assert scores is not None
    if any(clause.name == "pyramid" for clause in spec.score):
        visible = visible & (scores != -torch.inf)
    sink = None if spec.sink is None else call.row_value(spec.sink.expr(0))
    rows = Rows(call, q, k, v, scores, visible, key_heads, summed, sink)
    if spec.selection is None:
        return rows
    selected = SELECTIONS[spec.selection.name](rows, spec.selection)
    return replace(rows, visible=visible & selected.visible, factor=selected.factor)


def sources(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The keys and values that are attended to, where they are not k and v themselves."""
    call = Call(spec, Grid(q.shape[0], q.shape[1], q.shape[2], k.shape[2]), operands, q.dtype)
    if spec.through is not None:
        between = call.operand(spec.through, 0)
        k, v = between, reference(spec.through.spec(1), between, k, v, **operands)
    if spec.pairing is not None:
        k, v = paired(k, call.operand(spec.pairing, 0)), paired(v, call.operand(spec.pairing, 1))
    return k, v


def finish(rows: Rows) -> Attended:
    """Normalise, weigh the values, correct; the log-sum-exp counts the sink."""
    spec = rows.spec
    if spec.normalizer.name == "recurrent" and spec.normalizer.operand("value_decay") is not None:
        output = scaled_reads(rows)
        return Attended(output, torch.full_like(rows.scores, torch.nan), torch.full_like(output[..., 0], torch.nan))
    weights = weights_of(rows)
    output = weigh(rows, weights)
    if spec.correction is not None:
        output = delta_correction(rows, output)
    masked = rows.scores.masked_fill(~rows.visible, -torch.inf)
    lse = torch.logsumexp(masked if rows.sink is None else torch.cat([masked, rows.sink], -1), -1)
    return Attended(output, weights, lse)


def weights_of(rows: Rows) -> Tensor:
    """The finished weights: zero at hidden keys; a row that sees nothing averages where the spec says so."""
    spec, call = rows.spec, rows.call
    weights = NORMALIZERS[spec.normalizer.name](rows).masked_fill(~rows.visible, 0.0)
    live = rows.visible
    if spec.empty_row == "mean" and rows.sink is None:
        empty = ~rows.visible.any(-1, keepdim=True)
        weights = torch.where(empty, torch.full_like(weights, 1.0 / weights.shape[-1]), weights)
        live = live | empty
    if rows.factor is not None:
        weights = weights * rows.factor
    if spec.value_scale is not None:
        weights = weights * call.value(spec.value_scale.expr(0))
    for clause in spec.weighting:
        change = convolve if clause.name == "weight_conv" else mix_weights
        weights = change(call, clause, weights).masked_fill(~live, 0.0)
    return weights


def weigh(rows: Rows, weights: Tensor) -> Tensor:
    """Weights times values, rounded as `precision` says, and turned back where the values were rotated."""
    spec, call = rows.spec, rows.call
    output = weights @ rows.v if spec.precision is None else weighted_values(call, weights, rows.v, spec.precision)
    if spec.position is not None and spec.position.word("values") == "yes":
        output = rotate(output, spec.position, -angles_of(call, spec.position, "q"))
    return output


def scaled_reads(rows: Rows) -> Tensor:
    """A recurrence whose value channels decay each on their own: there are no scores, so only scales of a row act."""
    spec, call = rows.spec, rows.call
    output = recurrent_reads(call, rows.q, rows.k, rows.v)
    acting = [str(part) for part in conjuncts(spec.mask) if part != Term("causal")]
    acting += [
        str(c) for c in (*spec.score, spec.selection, spec.value_scale, *spec.weighting) if c is not None and c.name != "scale"
    ]
    if acting:
        raise InputMismatch(
            f"value_decay leaves no weights for {acting[0]}",
            where=str(spec.normalizer),
            next_move="Only causal and scale(…) of b, h and q can stand beside it.",
        )
    for clause in spec.score:
        output = output * call.row_value(clause.expr(0))
    return output


def delta_correction(rows: Rows, output: Tensor) -> Tensor:
    """Add to each block of rows what its first row lost: o[i+u] + (dense[i] - sparse[i]); the last rows are dense.

    Source: "Delta Attention" (dense rows every gamma queries, difference carried forward within the block).
    """
    clause = rows.spec.correction
    assert clause is not None
    mask = clause.expr_or_none("dense") or rows.spec.mask
    seen = torch.ones_like(rows.visible) if mask is None else rows.call.mask(mask)
    shown = replace(rows, visible=seen, factor=None)
    dense = weigh(shown, weights_of(shown))
    gamma, q_len = max(1, clause.count(0)), output.shape[2]
    first = torch.arange(q_len, device=output.device) // gamma * gamma
    corrected = output + (dense - output)[:, :, first]
    tail = max(0, q_len - (q_len % gamma + max(clause.count("tail"), gamma)))
    return torch.cat([corrected[:, :, :tail], dense[:, :, tail:]], 2)


def even_heads(heads: int, shared: int, device: torch.device) -> Tensor:
    return torch.arange(heads, device=device) * shared // heads


def head_map(call: Call, heads: int, key_heads: int) -> Tensor:
    """Which key head each query head reads: `heads(…, map=name)`, else i * Hk // H."""
    clause = call.spec.heads
    if clause is None or clause.operand("map") is None:
        return even_heads(heads, key_heads, torch.device(call.grid.device))
    table = call.operand(clause, "map").long()
    if table.shape != (heads,) or int(table.min()) < 0 or int(table.max()) >= key_heads:
        raise InputMismatch(
            f"{clause} needs a table of {heads} numbers below {key_heads}",
            where=f"{clause.operand('map')} {table.tolist()}",
            next_move="Entry i is the key head that query head i reads.",
        )
    return table


def query_offset(spec: AttentionSpec, q_len: int, kv_len: int) -> int:
    return 0 if spec.offset is None else int(evaluate(spec.offset.expr(0), Grid(1, 1, q_len, kv_len)))


def check_shared(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise InputMismatch where tensors that the spec calls one are not equal."""
    shared = "" if spec.shared is None else spec.shared.word(0)
    problems = [
        ("q" in shared and not torch.equal(q, k), "q and k differ"),
        ("v" in shared and not torch.equal(k[..., : v.shape[-1]], v), "v is not the first channels of k"),
    ]
    for wrong, message in problems:
        if wrong:
            raise InputMismatch(message, where=str(spec.shared), next_move="Give the same tensor, or drop the clause.")


def check_shapes(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise InputMismatch where q, k, v do not fit the spec or one another."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise InputMismatch(f"{name} has {x.ndim} dimensions", where=str(tuple(x.shape)), next_move="Give [B, H, L, D].")
    mapped = spec.heads is not None and spec.heads.operand("map") is not None
    uneven = not mapped and q.shape[1] % k.shape[1] != 0
    uneven_values = not (mapped and k.shape[1] == v.shape[1]) and q.shape[1] % v.shape[1] != 0
    problems = [
        (q.shape[0] != k.shape[0] or k.shape[0] != v.shape[0], "q, k and v differ in batch"),
        (k.shape[2] != v.shape[2], "k and v differ in length"),
        (q.shape[3] != k.shape[3], "q and k differ in width"),
        (uneven or uneven_values, "query heads are no multiple of key or value heads"),
    ]
    if spec.head_counts is not None:
        problems.append((spec.head_counts != (q.shape[1], k.shape[1], v.shape[1]), f"the spec says {spec.heads}"))
    if spec.width is not None:
        widths = (spec.width.count(0), spec.width.count(1))
        problems.append((widths != (q.shape[3], v.shape[3]), f"the spec says {spec.width}"))
    for wrong, message in problems:
        if wrong:
            shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
            raise InputMismatch(message, where=shapes, next_move="q is [B, Hq, Q, D], k [B, Hk, K, D], v [B, Hv, K, Dv].")
