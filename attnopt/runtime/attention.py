"""attnopt.attention: one attention on tensors, from a spec line, by the best kernel that torch has for it here.

attention(q, k, v, spec="softmax causal & window(256) scale(0.125)")
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Const, Expr, Term, conjuncts, operands
from attnopt.ir.reference import check_shapes, reference
from attnopt.ir.spec import AttentionSpec, as_spec
from attnopt.runtime.flex_source import NARROWEST, compiler_at_hand, sayable

FLEX_SCORES = 1 << 22  # from this many scores per head on, skipping blocks is worth compiling for


def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec | str = "softmax", **loaded: Tensor) -> Tensor:
    """Compute `spec` on q [B, Hq, Q, D], k [B, Hk, K, D], v [B, Hk, K, Dv]; returns [B, Hq, Q, Dv].

    `loaded` are the tensors that the spec reads by name (`padding=`, `slopes=`, …). A spec without `scale` is not scaled.
    Raises SpecSyntaxError for a line that does not parse and InputMismatch for tensors that do not fit.
    """
    parsed = as_spec(spec)
    check_shapes(parsed, q, k, v)
    return backend_for(parsed, q, k, v)(parsed, q, k, v, loaded)


Backend = Callable[[AttentionSpec, Tensor, Tensor, Tensor, dict[str, Tensor]], Tensor]


def backend_for(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Backend:
    """sdpa where it can say the spec, compiled FlexAttention where blocks can be skipped or it alone can, else the reference."""
    plain = spec.normalizer.name == "softmax" and not spec.special and k.shape[1] == v.shape[1] and not mapped(spec)
    names = [clause.name for clause in spec.score]
    says_sdpa = plain and spec.scale is not None and all(n == "add" for n in names[sum(n == "scale" for n in names[:1]) :])
    flexible = (
        plain
        and sayable(spec)
        and min(q.shape[-1], v.shape[-1]) >= NARROWEST
        and compiler_at_hand()
        and full_rows(spec, q.shape[2], k.shape[2])
    )
    known = [part for part in conjuncts(spec.mask) if not operands(part)]
    skips = bool(known) and known != [Term("causal")] and q.shape[2] * k.shape[2] >= FLEX_SCORES
    if flexible and (skips or not says_sdpa):
        return by_flex
    return by_sdpa if says_sdpa else by_reference


def mapped(spec: AttentionSpec) -> bool:
    """Whether query heads find their key head in a table instead of by division."""
    return spec.heads is not None and spec.heads.operand("map") is not None


def by_sdpa(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, loaded: dict[str, Tensor]) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if spec.mask == Term("causal") and not spec.biases:
        return sdpa(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=grouped)
    grid = Grid(q.shape[0], q.shape[1], q.shape[2], k.shape[2], device=q.device)
    mask: Tensor | None = None
    for bias in spec.biases:
        value = evaluate(bias, grid, loaded).to(q.dtype)
        mask = value if mask is None else mask + value
    if spec.mask is not None:
        visible = evaluate(spec.mask, grid, loaded).bool()
        if mask is None and spec.empty_row != "mean":
            mask = visible
        else:
            lowest = torch.finfo(q.dtype).min if spec.empty_row == "mean" else -torch.inf
            mask = torch.where(visible, mask if mask is not None else q.new_zeros(()), q.new_tensor(lowest))
    return sdpa(q, k, v, attn_mask=mask, scale=spec.scale, enable_gqa=grouped)


sdpa = torch.nn.functional.scaled_dot_product_attention


def by_flex(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, loaded: dict[str, Tensor]) -> Tensor:
    from attnopt.runtime.flex import run_flex

    grid = Grid(q.shape[0], q.shape[1], q.shape[2], k.shape[2], device=q.device)
    evaluate_first = [evaluate(e, grid, loaded) for e in loads(spec)]  # names every operand that is missing or misshapen
    del evaluate_first
    return run_flex(q, k, v, [loaded[name] for name in spec.operands], str(spec))


def by_reference(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, loaded: dict[str, Tensor]) -> Tensor:
    return reference(spec, q, k, v, **loaded)


def loads(spec: AttentionSpec) -> list[Expr]:
    from attnopt.ir.expr import Load, walk

    exprs = [spec.mask, *(a for c in spec.score for a in c.args if not isinstance(a, (bool, int, float, str, Const)))]
    return [e for expr in exprs if expr is not None for e in walk(expr) if isinstance(e, Load)]  # type: ignore[arg-type]


def full_rows(spec: AttentionSpec, q_len: int, kv_len: int) -> bool:
    """Whether no row can be empty, or empty rows are zero anyway: FlexAttention knows no other rule."""
    if spec.mask is None or spec.empty_row != "mean":
        return True
    if operands(spec.mask):
        return False
    return bool(evaluate(spec.mask, Grid(1, 1, q_len, kv_len)).expand(1, 1, q_len, kv_len).any(-1).all())
