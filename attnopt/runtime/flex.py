"""attnopt::flex_attention: a spec run by torch's compiled FlexAttention, as one operator that export can save.

    flex_attention(q, k, v, [bias0], "softmax scale(0.1) softcap(50.0) add(load(bias0, 0, h, row, k)) causal")

The score modification is the spec's own expression tree, evaluated on scalar indices. Masks that read no data become a
block mask, built once per shape; masks that read data are applied to the scores.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from attnopt.ir.expr import Apply, Const, Expr, Index, Load, Size, Term, conjunction, conjuncts, expand_term, operands
from attnopt.ir.spec import AttentionSpec, parse

SCALARS: dict[str, Callable[..., Any]] = {
    "or": lambda a, b: a | b,
    "and": lambda a, b: a & b,
    "not": lambda a: ~a,
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne", "add", "sub", "mul", "neg", "abs")},
    "div": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "min": torch.minimum,
    "max": torch.maximum,
    "pow": torch.pow,
    **{name: getattr(torch, name) for name in ("exp", "log", "tanh", "sqrt", "sigmoid", "floor", "where")},
    "int": lambda a: a.long(),
    "float": lambda a: a.float(),
}
MODS = {"relu": torch.relu, "tanh": torch.tanh, "square": torch.square, "silu": torch.nn.functional.silu, "exp": torch.exp}


def at(expr: Expr, where: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The expression at one point; `where` holds the indices and sizes."""
    if isinstance(expr, Const):
        return expr.value
    if isinstance(expr, (Index, Size)):
        return where[expr.name if isinstance(expr, Index) else f"size({expr.name})"]
    if isinstance(expr, Term):
        return at(expand_term(expr), where, tensors)
    if isinstance(expr, Load):
        tensor = tensors[expr.operand]
        return tensor[tuple(at(i, where, tensors) for i in expr.indices)]
    assert isinstance(expr, Apply)
    return SCALARS[expr.op](*(at(a, where, tensors) for a in expr.args))


def score_modification(spec: AttentionSpec, tensors: dict[str, Tensor], masked: Expr | None) -> Callable[..., Tensor] | None:
    """The spec's score terms after the leading scale, and the data-dependent part of its mask, as a score_mod."""
    terms = (
        spec.score[1:]
        if spec.score and spec.score[0].name == "scale" and isinstance(spec.score[0].args[0], Const)
        else spec.score
    )
    if not terms and masked is None:
        return None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, row: Tensor, k: Tensor) -> Tensor:
        where = {"b": b, "h": h, "row": row, "q": row, "k": k}
        for term in terms:
            if term.name == "softcap":
                score = term.args[0] * torch.tanh(score / term.args[0])
            elif term.name == "mod":
                score = MODS[str(term.args[0])](score)
            elif term.name == "scale":
                score = score * at(term.args[0], where, tensors)  # type: ignore[arg-type]
            else:
                score = score + at(term.args[0], where, tensors)  # type: ignore[arg-type]
        return score if masked is None else torch.where(at(masked, where, tensors), score, -float("inf"))

    return score_mod


@lru_cache(maxsize=64)
def block_mask(mask: Expr, q_len: int, kv_len: int, heads: int | None, device: str) -> BlockMask:
    """Which blocks a mask without operands leaves; shared by all calls of the same shape."""

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, k: Tensor) -> Tensor:
        return at(mask, {"b": b, "h": h, "row": row, "q": row, "k": k}, {})  # type: ignore[no-any-return]

    return create_block_mask(mask_mod, None, heads, q_len, kv_len, device=device)


@lru_cache(maxsize=1)
def compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)  # type: ignore[return-value]


def run_flex(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], spec: str) -> Tensor:
    """q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E] -> [B, H, Q, E]; tensors in the order of `parse(spec).operands`."""
    parsed = parse(spec)
    named = dict(zip(parsed.operands, tensors, strict=True))
    parts = conjuncts(parsed.mask)
    static = conjunction(*(p for p in parts if not operands(p)))
    loaded = conjunction(*(p for p in parts if operands(p)))
    leading = parsed.score[0].args[0] if parsed.score and parsed.score[0].name == "scale" else None
    return compiled()(
        q,
        k,
        v,
        score_mod=score_modification(parsed, named, loaded),
        block_mask=None if static is None else block_mask(static, q.shape[2], k.shape[2], None, str(q.device)),
        scale=float(leading.value) if isinstance(leading, Const) else 1.0,
        enable_gqa=q.shape[1] != k.shape[1],
    )


@torch.library.custom_op("attnopt::flex_attention", mutates_args=())
def flex_operator(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    """See `run_flex`. Inference only: no gradient is defined."""
    return run_flex(q, k, v, operands, spec).contiguous()


@flex_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))
