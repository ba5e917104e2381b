"""Print a spec as the Python source that FlexAttention compiles: every number of the spec is a literal in it.

    softmax scale(0.1) softcap(50.0) causal & load(mask0, b, 0, row, k)   ->

        def attend(q, k, v, block_mask, mask0):
            def score_mod(score, b, h, row, k_): …
            return flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=0.1, enable_gqa=…)

Numbers that reach the compiler as closures become symbols there, and FlexAttention's templates refuse symbols. One function per
spec also gives each spec its own cache of compiled shapes.
"""

from __future__ import annotations

import shutil

from attnopt.ir.clause import EXPRESSIONS, Clause
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Apply, Const, Expr, Index, Load, Size, Term, conjunction, conjuncts, expand_term, operands, walk
from attnopt.ir.spec import AttentionSpec

INFIX = {
    "or": "|", "and": "&", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "add": "+", "sub": "-", "mul": "*",
    "div": "/", "floordiv": "//", "mod": "%",
}  # fmt: skip
NARROWEST = 16  # channels per head that FlexAttention's products need
SCORE_TERMS = ("scale", "softcap", "add", "mod")
PREFIX = {"not": "~", "neg": "-"}
METHODS = {"int": "long", "float": "float", "float32": "float"}
CALLS = {
    name: f"torch.{name}" for name in ("abs", "exp", "log", "tanh", "sqrt", "sin", "cos", "sigmoid", "floor", "pow", "where")
}
BOUNDS = {"min": ("torch.minimum", "max"), "max": ("torch.maximum", "min")}
MODS = {"relu": "torch.relu({})", "tanh": "torch.tanh({})", "square": "torch.square({})", "exp": "torch.exp({})",
        "silu": "torch.nn.functional.silu({})"}  # fmt: skip


def split_mask(spec: AttentionSpec) -> tuple[Expr | None, Expr | None]:
    """The parts of the mask that are known without data, and those that read operands."""
    parts = conjuncts(spec.mask)
    return conjunction(*(p for p in parts if not operands(p))), conjunction(*(p for p in parts if operands(p)))


def attend_source(spec: AttentionSpec) -> str:
    """Source of `attend(q, k, v, block_mask, *operands)`; operands in the order of `spec.operands`."""
    leading, terms = leading_scale(spec)
    lines = [score_line(term) for term in terms]
    _, loaded = split_mask(spec)
    if loaded is not None:
        lines.append(f"score = torch.where({printed(loaded)}, score, -float('inf'))")
    names = ", ".join(["q", "k", "v", "block_mask", *map(argument, spec.operands)])
    body = [f"def attend({names}):"]
    if lines:
        body += ["    def score_mod(score, b, h, row, col):", *(f"        {line}" for line in lines), "        return score"]
    modified = "score_mod" if lines else "None"
    options = f"score_mod={modified}, block_mask=block_mask, scale={leading!r}, enable_gqa=q.shape[1] != k.shape[1]"
    return "\n".join([*body, f"    return flex_attention(q, k, v, {options})", ""])


def mask_source(mask: Expr) -> str:
    """Source of `mask_mod(b, h, row, col)` for a mask that reads no data."""
    return f"def mask_mod(b, h, row, col):\n    return {printed(mask)}\n"


def leading_scale(spec: AttentionSpec) -> tuple[float, tuple[Clause, ...]]:
    """The constant scale that stands first, which FlexAttention takes as a number, and the terms after it."""
    first = spec.score[0] if spec.score else None
    if first is not None and first.name == "scale" and isinstance(first.expr(0), Const):
        return float(first.expr(0).value), spec.score[1:]  # type: ignore[union-attr]
    return 1.0, spec.score


def score_line(term: Clause) -> str:
    if term.name == "softcap":
        cap = repr(float(term.number(0)))
        return f"score = {cap} * torch.tanh(score / {cap})"
    if term.name == "mod":
        return f"score = {MODS[term.word(0)].format('score')}"
    return f"score = score {'*' if term.name == 'scale' else '+'} {printed(term.expr(0))}"


def sayable(spec: AttentionSpec) -> bool:
    """Whether score terms and mask can be printed; lengths are not known inside a compiled kernel."""
    exprs = [e for e in (spec.mask, *(a for c in spec.score for a in c.args if isinstance(a, EXPRESSIONS))) if e is not None]
    known = all(c.name in SCORE_TERMS and (c.name != "mod" or c.word(0) in MODS) for c in spec.score)
    return known and not any(isinstance(e, Size) for x in exprs for e in walk(x))


def compiler_at_hand() -> bool:
    """Whether the compiled form can be built here."""
    return shutil.which("g++") is not None or shutil.which("clang++") is not None


def argument(operand: str) -> str:
    """The parameter that holds an operand; no index and no tensor has such a name."""
    return f"x_{operand.replace('.', '·')}"


def printed(expr: Expr) -> str:
    """The expression at one point (b, h, row, col), every compound in parentheses."""
    if isinstance(expr, Term):
        return printed(expand_term(expr))
    if isinstance(expr, Index):
        return {"k": "col", "q": "row"}.get(expr.name, expr.name)
    if isinstance(expr, Load):
        return f"{argument(expr.operand)}[{', '.join(map(printed, expr.indices))}]" if expr.indices else argument(expr.operand)
    if not any(isinstance(e, (Index, Load, Size)) for e in walk(expr)):
        value = evaluate(expr, Grid(1, 1, 1, 1)).item()
        return f"({value!r})" if abs(value) != float("inf") else f"float('{value}')"
    assert isinstance(expr, Apply)
    if expr.op in BOUNDS:
        function, limit = BOUNDS[expr.op]
        fixed = [a for a in expr.args if isinstance(a, Const)]
        if fixed:
            (moving,) = (a for a in expr.args if a is not fixed[0])
            return f"torch.clamp({printed(moving)}, {limit}={fixed[0].value!r})"
        return f"{function}({', '.join(map(printed, expr.args))})"
    if expr.op in INFIX:
        return f"({printed(expr.args[0])} {INFIX[expr.op]} {printed(expr.args[1])})"
    if expr.op in PREFIX:
        return f"({PREFIX[expr.op]}{printed(expr.args[0])})"
    if expr.op in METHODS:
        return f"{printed(expr.args[0])}.{METHODS[expr.op]}()"
    return f"{CALLS[expr.op]}({', '.join(map(printed, expr.args))})"
