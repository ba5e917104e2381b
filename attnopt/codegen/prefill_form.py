"""What the families for many queries have in common, in any language: a kernel's form, and a spec's expressions.

Form(64, 64, "float16", operands=(("slopes", "float32"),), lse=True)
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.clause import Clause
from attnopt.ir.expr import Expr, Index, substitute
from attnopt.ir.spec import AttentionSpec
from attnopt.runtime.flex_source import leading_scale

WIDEST = 256
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for besides the spec: widths of q and v rows, types of q, k, v and of each operand, outputs.

    packed: sequences of any lengths stand one after the other. limits: the largest magnitude in an operand, where it is known.
    """

    width: int
    value_width: int
    dtype: str = "float16"
    operands: tuple[tuple[str, str], ...] = ()
    lse: bool = False
    packed: bool = False
    limits: tuple[tuple[str, float], ...] = ()


def expressions(spec: AttentionSpec) -> list[Expr]:
    """Every expression that a kernel evaluates."""
    found = [c.expr(0) for c in spec.score if c.name in ("scale", "add")]
    found += [] if spec.mask is None else [spec.mask]
    return found + [c.expr(0) for c in (spec.sink, spec.offset) if c is not None]


def from_rows(spec: AttentionSpec) -> AttentionSpec:
    """Without an offset a row is the position of its query: one name for both."""
    if spec.offset is not None:
        return spec
    same: dict[str, Expr] = {"row": Index("q")}
    score = tuple(Clause(c.name, (substitute(c.expr(0), same),)) if c.name in ("scale", "add") else c for c in spec.score)
    sink = None if spec.sink is None else Clause("sink", (substitute(spec.sink.expr(0), same),))
    mask = None if spec.mask is None else substitute(spec.mask, same)
    return spec.with_(score=score, sink=sink, mask=mask)


def positive_scale(spec: AttentionSpec) -> tuple[float, tuple[Clause, ...]]:
    """The first scale and the terms after it; one that turns the order of scores round is a term like others."""
    scale, terms = leading_scale(spec)
    return (scale, terms) if scale > 0 else (1.0, spec.score)
