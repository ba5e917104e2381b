"""Specs and expressions print as one line and read back equal; lines that mean nothing say where and why."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnopt.errors import SpecSyntaxError
from attnopt.ir.clause import Clause, Kind
from attnopt.ir.expr import (
    INDICES,
    OPERATORS,
    TERMS,
    Apply,
    Const,
    Index,
    Load,
    Size,
    Term,
    conjuncts,
    expand,
    indices,
    operands,
    render,
    walk,
)
from attnopt.ir.grammar import parse_expr
from attnopt.ir.signatures import NORMALIZERS, SIGNATURES
from attnopt.ir.spec import MANY, SOFTMAX, AttentionSpec, parse

# Keywords are legal names of operands: the grammar tells them apart by place.
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,6}", fullmatch=True) | st.sampled_from(["q", "load", "causal", "softmax", "inf"])
COUNTS = st.integers(0, 10**6)
NUMBERS = st.floats(allow_nan=False) | st.integers(-(10**20), 10**20).map(float)
LITERALS = st.booleans() | st.integers() | st.floats() | st.sampled_from([1e-300, 1e22, -0.0, -math.inf, 5e-324])


def applications(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.sampled_from(sorted(OPERATORS)).flatmap(
        lambda op: st.builds(Apply, st.just(op), st.tuples(*[inner] * OPERATORS[op].arity))
    )


def terms() -> st.SearchStrategy:
    numbers = st.integers(-50, 5000) | st.floats(allow_nan=False)
    return st.sampled_from(sorted(TERMS)).flatmap(
        lambda name: st.builds(Term, st.just(name), st.tuples(*[numbers] * len(TERMS[name][0])))
    )


LEAVES = st.sampled_from(INDICES).map(Index) | LITERALS.map(Const) | NAMES.map(Size) | terms()
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: applications(inner) | st.builds(Load, NAMES, st.lists(inner, max_size=3).map(tuple)),
    max_leaves=12,
)
SMALL = st.recursive(LEAVES, applications, max_leaves=4)


def arguments(kind: Kind, depth: int) -> st.SearchStrategy:
    if isinstance(kind, tuple):
        return st.sampled_from(kind)
    if kind == "spec":
        return specs(depth - 1)
    return {"expr": SMALL, "count": COUNTS, "number": NUMBERS, "operand": NAMES}[kind]


def clause(name: str, depth: int) -> st.SearchStrategy:
    """A clause of this name: every argument, any subset of the options, in any order."""
    signature = SIGNATURES[name]

    def with_options(chosen: list[str]) -> st.SearchStrategy:
        count = st.integers(len(signature.args) - signature.optional, len(signature.args))
        args = count.flatmap(lambda n: st.tuples(*(arguments(kind, depth) for kind in signature.args[:n])))
        pairs = st.tuples(*(st.tuples(st.just(o), arguments(signature.options[o][0], depth)) for o in chosen))
        return st.builds(Clause, st.just(name), args, pairs)

    options = st.lists(st.sampled_from(sorted(signature.options)), unique=True, max_size=4) if signature.options else st.just([])
    return options.flatmap(with_options)


def slot_of(name: str) -> str:
    return SIGNATURES[name].slot


SLOTS = sorted({slot_of(name) for name in SIGNATURES})


def specs(depth: int) -> st.SearchStrategy:
    """Specs with any of the slots filled; at depth 0 none that holds a spec."""
    usable = [n for n, s in SIGNATURES.items() if depth > 0 or "spec" not in s.args]
    by_slot = {slot: st.sampled_from([n for n in usable if slot_of(n) == slot]) for slot in SLOTS if slot in map(slot_of, usable)}

    def filled(slot: str) -> st.SearchStrategy:
        if slot == "empty_row":
            return st.sampled_from(SIGNATURES["empty"].args[0])
        one = by_slot[slot].flatmap(lambda name: clause(name, depth))
        return st.lists(one, min_size=1, max_size=3).map(tuple) if slot in MANY else one

    def chosen(slots: list[str]) -> st.SearchStrategy:
        fields = {slot: filled(slot) for slot in {*slots, "normalizer"}}
        return st.builds(AttentionSpec, mask=st.none() | SMALL, **fields)

    return st.lists(st.sampled_from(sorted(by_slot)), unique=True, max_size=6).flatmap(chosen)


GENEROUS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@GENEROUS
@given(EXPRESSIONS)
def test_expressions_read_back(expr):
    line = render(expr)
    assert "\n" not in line
    assert parse_expr(line) == expr


@GENEROUS
@given(specs(1))
def test_specs_read_back(spec):
    line = str(spec)
    assert "\n" not in line
    assert parse(line) == spec
    assert str(parse(line)) == line
    assert set(spec.operands) == set(parse(line).operands)


@pytest.mark.parametrize("name", [n for n in SIGNATURES if n != "empty"])
def test_every_clause_reads_back(name):
    """No clause hides behind the luck of the draw: each is drawn on its own."""

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(clause(name, 1))
    def reads_back(drawn):
        slot = slot_of(name)
        spec = AttentionSpec(**{slot: (drawn,) if slot in MANY else drawn})
        assert parse(str(spec)) == spec
        assert getattr(parse(str(spec)), slot) == ((drawn,) if slot in MANY else drawn)

    reads_back()


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("causal & window(4) | global(2)", "(causal & window(4)) | global(2)"),
        ("causal | window(4) & global(2)", "causal | (window(4) & global(2))"),
        ("~causal & padding", "(~causal) & padding"),
        ("k <= q & q < 4", "(k <= q) & (q < 4)"),
        ("q - k < 4 | k == 0", "((q - k) < 4) | (k == 0)"),
        ("q - k - 1", "(q - k) - 1"),
        ("q // 2 * 3 + 1", "((q // 2) * 3) + 1"),
        ("-q * k", "(-q) * k"),
        ("-2 * k", "(-2) * k"),
        ("~k <= q", "(~k) <= q"),
        ("q % 4 / 2", "(q % 4) / 2"),
    ],
)
def test_precedence(line, same):
    assert parse_expr(line) == parse_expr(same)
    assert str(parse_expr(line)) == line


def test_parentheses_stay_where_they_matter():
    for line in (
        "causal & (window(4096) | global(64))",
        "q - (k - 1)",
        "-(q + k)",
        "~(causal | padding)",
        "(q < k) == true",
    ):
        assert str(parse_expr(line)) == line
    for line in ("(causal) & (padding)", "((q)) - k", "(q * k) + 1"):
        assert "(" not in str(parse_expr(line))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("0.125", 0.125),
        (".5", 0.5),
        ("2.", 2.0),
        ("1e-05", 1e-5),
        ("1E6", 1e6),
        ("-2.5e+3", -2500.0),
        ("inf", math.inf),
        ("-inf", -math.inf),
        ("true", True),
        ("false", False),
    ],
)
def test_literals(text, value):
    parsed = parse_expr(text)
    assert isinstance(parsed, Const)
    assert parsed.value == value and type(parsed.value) is type(value)


def test_literals_that_print_differently_differ():
    ones = {Const(1), Const(1.0), Const(True)}
    assert len(ones) == 3
    assert Const(math.nan) == Const(math.nan) != Const(math.inf)
    assert Apply("neg", (Const(5),)) != Const(-5)
    assert str(Apply("neg", (Const(5),))) == "-(5)"


def test_terms_stand_for_their_meaning():
    assert expand(parse_expr("causal & window(4)")) == parse_expr("k <= q & q - k < 4")
    assert expand(parse_expr("alibi")) == parse_expr("load(slopes, h) * (k - q)")
    assert operands(parse_expr("padding & document & load(x, h)")) == ("padding", "document", "x")
    assert indices(parse_expr("causal")) == {"q", "k"}
    assert any(node == Index("b") for node in walk(parse_expr("padding")))
    assert conjuncts(parse_expr("causal & window(2) & ~padding")) == tuple(map(parse_expr, ("causal", "window(2)", "~padding")))


def test_clauses_may_stand_in_any_order_and_print_in_one():
    spec = parse("causal & window(1024) empty(zero) scale(0.125) softmax heads(8, 2, 2) softcap(50)")
    assert str(spec) == "softmax heads(8, 2) scale(0.125) softcap(50.0) causal & window(1024) empty(zero)"
    assert spec.head_counts == (8, 2, 2)
    assert spec.scale == 0.125


def test_score_terms_keep_their_order():
    one, other = parse("softmax softcap(5.0) scale(2.0)"), parse("softmax scale(2.0) softcap(5.0)")
    assert one != other
    assert (one.scale, other.scale) == (1.0, 2.0)
    assert parse("softmax scale(load(t, h))").scale is None


def test_clauses_that_mean_the_same_are_equal():
    assert parse("softmax heads(4, 4, 4)") == parse("softmax heads(4)") == parse("softmax heads(4, 4)")
    assert parse("softmax width(64, 64)") == parse("softmax width(64)")
    assert parse("softmax rotary(64, base=10000)") == parse("softmax rotary(64)")
    assert parse("softmax scale(1)") != parse("softmax scale(1.0)")
    assert parse("softmax empty(mean)") == parse("softmax") == AttentionSpec()


def test_a_mask_may_look_like_a_clause():
    spec = AttentionSpec(mask=parse_expr("sigmoid(q) < 0.5 & causal"))
    assert str(spec) == "softmax (sigmoid(q) < 0.5 & causal)"
    assert parse(str(spec)) == spec
    assert parse("softmax (causal | global(4)) & padding").mask == parse_expr("(causal | global(4)) & padding")
    assert parse("softmax ~causal").mask == parse_expr("~causal")
    assert parse("softmax -k < q").mask == parse_expr("-k < q")


def test_nested_specs():
    spec = parse(
        "softmax through(agents, softmax scale(0.5) causal | global(2)) plus(0.25, sigmoid window(4), k=other) window(9)"
    )
    assert spec.through.spec(1).mask == parse_expr("causal | global(2)")
    assert spec.plus[0].spec(1).normalizer == Clause("sigmoid")
    assert spec.operands == ("agents", "other")
    assert spec.mask == parse_expr("window(9)")


@pytest.mark.parametrize(
    ("line", "at", "says"),
    [
        ("softmax causl", 9, "did you mean 'causal'"),
        ("softmx causal", 1, "did you mean 'softmax'"),
        ("softmax softcp(5.0)", 9, "did you mean 'softcap'"),
        ("softmax rotary(64, bas=5.0)", 20, "an option of rotary (base, pairs"),
        ("softmax window(1, 2)", 9, "1 argument(s) of window"),
        ("softmax softcap", 9, "1 argument(s) for softcap"),
        ("softmax softcap(1.0, 2.0)", 22, "at most 1 argument(s) for softcap"),
        ("softmax where(q, k)", 9, "3 arguments of where"),
        ("softmax softcap(x)", 17, "a number"),
        ("softmax heads(-2)", 15, "a count"),
        ("softmax heads(2.5)", 15, "a count"),
        ("softmax heads(true)", 15, "a count"),
        ("softmax norm(l3)", 14, "one of rms, l2, layer, longest"),
        ("softmax blocks(2, 2, operand=4)", 30, "the name of an operand"),
        ("softmax sink(0.0) sink(1.0)", 19, "one sink only"),
        ("softmax sigmoid", 9, "one normalizer only"),
        ("softmax causal padding", 16, "one mask only; join masks with '&' or '|'"),
        ("softmax empty(zero) empty(zero)", 21, "one empty_row only"),
        ("softmax rotary(8, base=1.0, base=2.0)", 29, "base once only"),
        ("causal", 1, "a normaliser (softmax, sigmoid"),
        ("", 1, "a normaliser"),
        ("softmax causal &", 17, "an expression"),
        ("softmax (causal", 16, "')'"),
        ("softmax causal)", 15, "the end of the line"),
        ("softmax q < k < 4", 15, "comparisons do not chain"),
        ("softmax causal $ 4", 16, "a number, a word or an operator"),
        ("softmax size(4)", 14, "the name of a length"),
        ("softmax load(1)", 14, "the name of an operand"),
        ("softmax window(q)", 9, "a number for window"),
        ("softmax plus(0.5, causal)", 19, "a normaliser"),
    ],
)
def test_errors_show_the_place(line, at, says):
    with pytest.raises(SpecSyntaxError) as caught:
        parse(line)
    message, shown, caret = str(caught.value).split("\n")
    assert f"at column {at}" in message
    assert says in message
    assert shown == f"  {line}"
    assert caret.rstrip(".").index("^") == at + 1


@pytest.mark.parametrize(
    ("name", "args", "options", "says"),
    [
        ("softcap", (), (), "takes 1 argument"),
        ("softcap", ("x",), (), "a number"),
        ("heads", (2.5,), (), "a count"),
        ("heads", (True,), (), "a count"),
        ("norm", ("l3",), (), "one of rms, l2, layer, longest"),
        ("rotary", (8,), (("bse", 2.0),), "no option bse"),
        ("blocks", (2, 2), (("operand", "two words"),), "cannot name"),
        ("add", ("text",), (), "an index expression"),
        ("nothing", (), (), "no clause is named"),
    ],
)
def test_clauses_check_their_arguments(name, args, options, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        Clause(name, args, options)


def test_a_clause_fills_its_own_slot_only():
    with pytest.raises(ValueError, match="fills the slot 'sink'"):
        AttentionSpec(gate=Clause("sink", (0.0,)))
    with pytest.raises(ValueError, match="one of mean, zero, free"):
        AttentionSpec(empty_row="none")


def test_the_table_is_whole():
    assert set(NORMALIZERS) == {n for n in SIGNATURES if slot_of(n) == "normalizer"}
    assert set(SLOTS) <= set(AttentionSpec.__dataclass_fields__)
    assert AttentionSpec().normalizer == SOFTMAX
