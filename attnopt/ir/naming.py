"""Give the parts of a lifted mask or bias their names.

    k <= q & q - k < 4096 & load(x, b, k)     ->    causal & window(4096) & padding       and x is called `padding`
    load(x, b, q) == load(x, b, k)            ->    document                              load(x, h) * (k - q)  ->  alibi

Conditions must be simplified (`ir.simplify`) before. A name is given where the expression is the named term's own meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attnopt.ir.expr import Apply, Const, Expr, Index, Load, Size, Term, apply, conjuncts, expand_term, walk
from attnopt.ir.linear import Linear, at_most
from attnopt.ir.simplify import Simplifier


def only(atom: Expr) -> dict[Expr, int]:
    return {atom: 1}


B, H, Q, K, ROW = (Index(name) for name in ("b", "h", "q", "k", "row"))


BEHIND: dict[Expr, int] = {K: 1, Q: -1}  # key less query
AHEAD: dict[Expr, int] = {K: -1, Q: 1}


@dataclass
class Naming:
    """`renamed` collects new names of operands: the name in the expressions -> the name of the term's operand."""

    simplifier: Simplifier
    taken: frozenset[str] = frozenset()
    straight: bool = True  # the position of a query is its row
    renamed: dict[str, str] = field(default_factory=dict)

    def mask(self, expr: Expr) -> Expr:
        """The condition with named parts, static ones first: causal, window, …, then what reads data."""
        parts = [self.condition(part) for part in conjuncts(expr)]
        order = [*(p for p in parts if p == Term("causal")), *(p for p in parts if isinstance(p, Term) and p != Term("causal")),
                 *(p for p in parts if not isinstance(p, Term))]  # fmt: skip
        loads = [p for p in order if isinstance(p, Term) and p.name in ("padding", "document", "prefix")]
        result: Expr | None = None
        for part in [*(p for p in order if p not in loads), *loads]:
            result = part if result is None else apply("and", result, part)
        assert result is not None
        return result

    def condition(self, expr: Expr) -> Expr:
        if isinstance(expr, Apply) and expr.op in ("and", "or"):
            return Apply(expr.op, tuple(self.condition(a) for a in expr.args))
        if isinstance(expr, Apply) and expr.op == "not":
            return Apply("not", (self.positions(expr.args[0]) or expr.args[0],))  # what a name says is seen, not hidden
        return self.positions(expr) or self.quotients(expr) or self.loads(expr) or expr

    def positions(self, expr: Expr) -> Expr | None:
        """Bounds on k - q, on k, or on q."""
        if not isinstance(expr, Apply) or expr.op not in ("le", "lt", "ge", "gt", "eq"):
            return None
        a, b = (self.simplifier.sum(x) for x in expr.args)
        if a is None or b is None:
            return None
        if expr.op == "eq":
            return Term("diagonal") if dict((a - b).terms) in (BEHIND, AHEAD) and not (a - b).constant else None
        bound = at_most(expr.op, a, b)
        terms, c = dict(bound.terms), bound.constant
        if terms == BEHIND and c <= 0:
            return Term("causal") if c == 0 else Term("lookahead", (1 - c,))
        if terms == AHEAD and c <= 0:
            return Term("window", (1 - c,))
        if terms == only(K) and c <= 0:
            return Term("global", (1 - c,))
        if terms == only(Q) and c <= 0:
            return Term("global_query", (1 - c,))
        if terms == {**only(Size("k")), K: -1} and c <= 0:
            return Term("last", (-c,))
        return Term("last_query", (-c,)) if terms == {**only(Size("k")), Q: -1} and c <= 0 else None

    def quotients(self, expr: Expr) -> Expr | None:
        """q // n == k // n."""
        if not isinstance(expr, Apply) or expr.op != "eq":
            return None
        a, b = expr.args
        both = isinstance(a, Apply) and isinstance(b, Apply) and a.op == b.op == "floordiv"
        if not both or a.args[1] != b.args[1] or {a.args[0], b.args[0]} != {K, Q}:  # type: ignore[union-attr]
            return None
        n = a.args[1]  # type: ignore[union-attr]
        return Term("chunk", (n.value,)) if isinstance(n, Const) else None

    def loads(self, expr: Expr) -> Expr | None:
        """A condition on one operand that some term describes."""
        if isinstance(expr, Load) and expr.indices == (B, K) and self.simplifier.kind(expr) == "bool":
            return self.called(expr.operand, "padding")
        if isinstance(expr, Apply) and expr.op == "eq" and all(isinstance(a, Load) for a in expr.args):
            a, b = expr.args
            assert isinstance(a, Load) and isinstance(b, Load)
            pairs = [{(B, Q), (B, K)}, *([{(B, ROW), (B, K)}] if self.straight else [])]
            if a.operand == b.operand and {a.indices, b.indices} in pairs:
                return self.called(a.operand, "document")
        if isinstance(expr, Apply) and expr.op == "lt" and expr.args[0] == K and isinstance(expr.args[1], Load):
            return self.called(expr.args[1].operand, "prefix") if expr.args[1].indices == (B,) else None
        return None

    def bias(self, expr: Expr) -> Expr:
        """`alibi`, and the buckets of relative tables, by their names."""
        if isinstance(expr, Load):
            return Load(expr.operand, tuple(self.bucket(i) or i for i in expr.indices))
        if isinstance(expr, Apply) and expr.op == "mul":
            for slopes, distance in (expr.args, expr.args[::-1]):
                straight = self.simplifier.sum(stripped(distance))
                if isinstance(slopes, Load) and slopes.indices == (H,) and straight == Linear(((K, 1), (Q, -1))):
                    return self.called(slopes.operand, "slopes", "alibi") or expr
        return expr

    def bucket(self, expr: Expr) -> Term | None:
        """A bucket of the distance: its two numbers are read off, and the term must then mean the same."""
        divisors = [
            e.args[1].value for e in walk(expr) if isinstance(e, Apply) and e.op == "div" and isinstance(e.args[1], Const)
        ]
        if len(divisors) != 2:
            return None
        ratio, exact = divisors
        for name in ("bucket", "causal_bucket"):
            term = Term(name, (exact, ratio))
            if self.simplifier.again(expand_term(term)) == expr:
                return term
        return None

    def called(self, operand: str, name: str, term: str = "") -> Expr | None:
        """The term, if its operand's name is free or given to this operand already."""
        if self.renamed.get(operand, name) != name or any(o != operand and n == name for o, n in self.renamed.items()):
            return None
        if name in self.taken and operand != name:
            return None
        self.renamed[operand] = name
        return Term(term or name)


def stripped(expr: Expr) -> Expr:
    """The whole number inside of float32(…)."""
    return expr.args[0] if isinstance(expr, Apply) and expr.op in ("float", "float32") else expr


def renamed(expr: Expr, names: Mapping[str, str]) -> Expr:
    """The expression with operands under other names; named terms keep theirs."""
    if isinstance(expr, Load):
        return Load(names.get(expr.operand, expr.operand), tuple(renamed(i, names) for i in expr.indices))
    return Apply(expr.op, tuple(renamed(a, names) for a in expr.args)) if isinstance(expr, Apply) else expr
