"""Simplified expressions keep their value everywhere, and reach the forms that names are given to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Apply, Const, Expr, Index, Load, Size, Term, expand_term
from attnopt.ir.grammar import parse_expr
from attnopt.ir.linear import Linear, linear
from attnopt.ir.naming import Naming
from attnopt.ir.simplify import Simplifier

B, H, Q, K = 2, 3, 5, 7
LIMITS = {
    "b": Linear(((Size("batch"), 1),), -1),
    "h": Linear(constant=H - 1),
    "q": Linear(((Size("q"), 1),), -1),
    "row": Linear(((Size("q"), 1),), -1),
    "k": Linear(((Size("k"), 1),), -1),
}
DTYPES = {"seen": "bool", "document": "int64", "slopes": "float32"}
OPERANDS = {
    "seen": torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1, 0]], dtype=torch.bool),
    "document": torch.tensor([[0, 0, 1, 1, 2, 2, 2], [3, 3, 3, 0, 0, 0, -1]]),
    "slopes": torch.tensor([0.5, -0.25, 2.0]),
}
SIMPLIFIER = Simplifier(DTYPES, LIMITS)
GRID = Grid(B, H, Q, K, sizes={"batch": B})


def value(expr: Expr) -> torch.Tensor:
    return evaluate(expr, GRID, OPERANDS).expand(B, H, Q, K)


def zero_apart(op: str, a: Expr, b: Expr) -> Expr:
    """As Swin compares regions: float32(a) - float32(b) == 0.0."""
    return Apply(op, (Apply("sub", (Apply("float32", (a,)), Apply("float32", (b,)))), Const(0.0)))


whole = st.deferred(
    lambda: st.one_of(
        st.sampled_from([Index(n) for n in ("b", "h", "q", "k", "row")]),
        st.integers(-9, 9).map(Const),
        st.sampled_from([Size("q"), Size("k"), Size("batch")]),
        st.just(Load("document", (Index("b"), Index("k")))),
        st.tuples(st.sampled_from(["add", "sub", "mul", "min", "max"]), whole, whole).map(lambda t: Apply(t[0], t[1:])),
        st.tuples(st.sampled_from(["floordiv", "mod"]), whole, st.integers(1, 6)).map(lambda t: Apply(t[0], (t[1], Const(t[2])))),
        st.tuples(st.sampled_from(["floordiv", "mod"]), whole, st.sampled_from([Size("q"), Size("k")])).map(
            lambda t: Apply(t[0], (t[1], t[2]))
        ),
        st.tuples(st.sampled_from(["neg", "abs"]), whole).map(lambda t: Apply(t[0], t[1:])),
        st.tuples(condition, whole, whole).map(lambda t: Apply("where", t)),
        condition.map(lambda c: Apply("int", (c,))),
    )
)
condition = st.deferred(
    lambda: st.one_of(
        st.booleans().map(Const),
        st.just(Load("seen", (Index("b"), Index("k")))),
        st.tuples(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), whole, whole).map(lambda t: Apply(t[0], t[1:])),
        st.tuples(st.sampled_from(["and", "or"]), condition, condition).map(lambda t: Apply(t[0], t[1:])),
        condition.map(lambda c: Apply("not", (c,))),
        st.tuples(real, st.sampled_from([0.0, -1e38])).map(lambda t: Apply("ne", (t[0], Const(t[1])))),
        st.tuples(condition, condition, condition).map(lambda t: Apply("where", t)),
        st.tuples(st.sampled_from(["eq", "ne"]), whole, whole).map(lambda t: zero_apart(*t)),
    )
)
real = st.deferred(
    lambda: st.one_of(
        st.sampled_from([0.0, 1.0, -1e38, 2.5]).map(Const),
        st.just(Load("slopes", (Index("h"),))),
        whole.map(lambda w: Apply("float32", (w,))),
        condition.map(lambda c: Apply("float32", (c,))),
        st.tuples(condition, real, real).map(lambda t: Apply("where", t)),
        st.tuples(st.sampled_from(["add", "sub", "min", "max"]), real, real).map(lambda t: Apply(t[0], t[1:])),
        st.tuples(real, st.sampled_from([0.0, 1.0, -3.0])).map(lambda t: Apply("mul", (t[0], Const(t[1])))),
    )
)


@settings(max_examples=400, deadline=None)
@given(condition)
def test_a_condition_keeps_its_value(expr):
    assert torch.equal(value(SIMPLIFIER.again(expr)).bool(), value(expr).bool())


@settings(max_examples=200, deadline=None)
@given(whole)
def test_a_whole_number_keeps_its_value(expr):
    assert torch.equal(value(SIMPLIFIER.again(expr)), value(expr))


@settings(max_examples=200, deadline=None)
@given(real)
def test_a_real_number_keeps_its_value(expr):
    assert torch.allclose(value(SIMPLIFIER.again(expr)).double(), value(expr).double(), rtol=1e-6, equal_nan=True)


@settings(max_examples=200, deadline=None)
@given(condition)
def test_naming_keeps_the_value(expr):
    simple = SIMPLIFIER.again(expr)
    naming = Naming(SIMPLIFIER)
    named = naming.mask(simple)
    operands = OPERANDS | {new: OPERANDS[old] for old, new in naming.renamed.items()}
    assert torch.equal(evaluate(named, GRID, operands).expand(B, H, Q, K).bool(), value(expr).bool())


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("k > q - 4096 & k <= q & load(seen, b, k)", "causal & window(4096) & padding"),
        ("abs(q - k) <= 3", "window(4) & lookahead(4)"),
        ("q // 8 == k // 8 & q >= k", "causal & chunk(8)"),
        ("where(k > q, -inf, 0.0) == 0.0", "causal"),
        ("load(document, b, q) == load(document, b, k)", "document"),
        ("k >= size(k) - 3 | k < 2", "last(3) | global(2)"),
        ("(1.0 - float32(load(seen, b, k))) * -3.0e38 == 0.0", "padding"),
        ("min(where(k <= q, 0.0, -inf), where(load(seen, b, k), 0.0, -inf)) == 0.0", "causal & padding"),
        ("~(k > q | ~load(seen, b, k))", "causal & padding"),
        ("where(k <= q, where(load(seen, b, k), 0.0, -1e38), -1e38) == 0.0", "causal & padding"),
        ("k <= q - 1", "k <= q - 1"),
        ("k < q | k == q", "causal"),
        ("q == k | load(seen, b, k) | k < q", "causal | padding"),
        ("k < 5 & k < 3", "global(3)"),
    ],
)
def test_spellings_reach_their_names(written, named):
    assert str(Naming(SIMPLIFIER).mask(SIMPLIFIER.again(parse_expr(written)))) == named


@pytest.mark.parametrize(
    ("written", "simple"),
    [
        ("(b * 3 + h) // 3", "b"),
        ("(b * 3 + h) % 3", "h"),
        ("(b * size(k) + k) // size(k)", "b"),
        ("k < size(k) & row >= 0", "true"),
        ("k >= size(k)", "false"),
        ("where(load(seen, b, k), 1.0, 0.0) * 2.0 - 2.0", "where(load(seen, b, k), 0.0, -2.0)"),
        ("int(load(seen, b, k)) == 0", "~load(seen, b, k)"),
        ("2 * (k + 1) - k - q", "k - q + 2"),
        ("max(k, 0)", "k"),
        ("h % 2 + h // 2 * 2", "h"),
        ("h // 2 - row // 2 <= 1 + 2 * h", "true"),
        ("where(h // 2 > 1, 1.0, 2.0)", "2.0"),
        ("float32(h) - float32(h % 2) == 0.0", "h == h % 2"),
        ("float32(h) == 2.0", "h == 2"),
        ("float32(k) - float32(row) != 0.0", "float32(k) - float32(row) != 0.0"),
        ("where(k < q, 1.0, where(k >= q, 2.0, 3.0))", "where(k <= q - 1, 1.0, 2.0)"),
        ("where(k < q, where(k < q, 1.0, 2.0), 3.0)", "where(k <= q - 1, 1.0, 3.0)"),
        ("(q + 3) // size(k) * size(k) * 5 + (q + 3) % size(k) * 5", "q * 5 + 15"),
    ],
)
def test_simple_forms(written, simple):
    assert str(SIMPLIFIER.again(parse_expr(written))) == simple


def test_a_float_comparison_is_not_turned_around():
    """NaN is neither above nor below."""
    assert str(SIMPLIFIER.again(parse_expr("~(load(slopes, h) < 1.0)"))) == "~(load(slopes, h) < 1.0)"


@pytest.mark.parametrize(("term", "args"), [("bucket", (8, 2.0794)), ("causal_bucket", (16, 1.5))])
def test_buckets_are_recognised_and_never_negative(term, args):
    expr = SIMPLIFIER.again(parse_expr(str(Term(term, args))))
    spelled = SIMPLIFIER.again(expand_term(Term(term, args)))
    assert Naming(SIMPLIFIER).bucket(spelled) == expr == Term(term, args)
    assert SIMPLIFIER.at_least_zero(spelled)


def test_sums():
    assert linear(parse_expr("3 - 2 * k + k + size(q)"), SIMPLIFIER.whole).expr() == parse_expr("size(q) - k + 3")
    assert linear(parse_expr("load(slopes, h) + 1"), SIMPLIFIER.whole) is None


def test_a_length_may_be_zero():
    """The length of a cache is zero before the first step: nothing may be proved from its being at least one."""
    assert str(SIMPLIFIER.again(parse_expr("size(past) >= 1"))) != "true"
    assert str(SIMPLIFIER.again(parse_expr("size(past) >= 0"))) == "true"
