"""The text of the decode family: what a spec leaves of it, what it refuses, and how many programs share the keys."""

from __future__ import annotations

import ast
import re

import pytest

from attnopt.codegen.triton.decode import DecodeForm, emit, span, supports
from attnopt.codegen.triton.kernels.merge import split_count
from attnopt.codegen.triton.tiles import Tile
from attnopt.ir.grammar import parse_expr
from attnopt.ir.ranges import key_range
from attnopt.ir.spec import parse

TILE = Tile(16, 64, 4, 3)


def text(line, form=DecodeForm(64, 64)):
    """The source without docstrings and with single blanks."""
    made = emit(parse(line), form, TILE)
    ast.parse(made)
    return re.sub(r"[ \n]+", " ", re.sub(r'""".*?"""', "", made, flags=re.DOTALL))


def test_a_plain_spec_leaves_a_plain_kernel():
    made = text("softmax scale(0.125)")
    gone = (
        "p_ks",
        "p_kz",
        "k_scales",
        "pages",
        "lengths",
        "p_lse",
        "mask_mod",
        "query_offset",
        "from_share",
        "b_shift",
        "P * ",
        "SHARE",
        "= ()",
    )
    assert [word for word in gone if word in made] == []
    assert "def attention( q, k, v, o=None, splits=0 ):" in made
    assert "b_s = tl.dot(b_q, b_codes, b_s, input_precision=PRECISION)" in made
    assert "SCALE = tl.constexpr(0.125)" in made
    assert len(emit(parse("softmax scale(0.125)"), DecodeForm(64, 64), TILE).splitlines()) < 240


def test_a_cache_leaves_what_it_needs():
    made = text(
        "softmax padding cache(k=int8, v=fp8, layout=paged, page=128)",
        DecodeForm(64, 64, "float16", (("padding", "bool"),), lengths=True),
    )
    assert "def attention( q, k, v, padding, k_scales, k_zeros, v_scales, pages, lengths, o=None, splits=0 ):" in made
    assert (
        "i_page = tl.cast(tl.load(p_pages + i_b * s_pages + i_n * BLOCK_K // PAGE), tl.int64)" in made
    )  # one page holds a block
    assert "o_row = o_n % PAGE" not in made
    assert "o_row = o_n % PAGE" in text("softmax cache(layout=paged, page=16)")
    assert [word for word in ("from_share", "b_q[", "p_vz", 'float32":') if word in made] == []


def test_parts_of_a_row():
    grouped = text("softmax cache(k=int4, v=int4, group=16)", DecodeForm(64, 96))
    assert [f"{name} = tl.constexpr({n})" in grouped for name, n in (("D_PIECE", 16), ("D_PIECES", 2), ("E_PIECES", 3))] == [
        True
    ] * 3
    assert "b_q[P * D_SHARES + SHARE]" in grouped


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("sigmoid", "the normaliser is sigmoid, not softmax"),
        ("softmax norm(rms)", "keys are normalised as they are read: a cache holds them as they are multiplied"),
        (
            "softmax blocks(64, 64, operand=t)",
            "blocks(64, 64, operand=t) leaves keys out: few queries read a cache whole, or pages of it by a table",
        ),
        ("softmax cache(k=int8, recent=4)", "the newest tokens stay exact"),
        ("softmax cache(layout=ring)", "a ring does not say which position a token has"),
        ("softmax cache(layout=paged)", "a paged cache needs page="),
        ("softmax cache(k=int4, k_axis=channel, group=32, layout=paged, page=16)", "pages of 16 tokens cut groups of 32 apart"),
        ("softmax cache(k=int1)", "the kernels read no int1 codes"),
        ("softmax cache(k=int2, k_bits=load(bits, b, h, k))", "k_bits of the cache"),
        ("softmax cache(k=int2, k_basis=hadamard)", "k_basis of the cache"),
        ("softmax cache(k=int4, k_axis=channel, block=100)", "tokens are rounded a block at a time"),
        ("softmax cache(k=int8, group=24)", "groups of 24 channels do not fit pieces of 16"),
    ],
)
def test_refusals(line, reason):
    assert supports(parse(line), DecodeForm(64, 64)).reason == reason


def test_rounded_products_are_for_many_queries():
    said = supports(parse("softmax precision(q=int8, k=int8)"), DecodeForm(64, 64))
    assert said.reason == "rounded products are those of many queries: a cache says by itself how it is stored"


def test_odd_rows_of_int4():
    reason = "rows of 33 channels cannot be packed two to a byte; the nearest widths are 32 and 34"
    assert supports(parse("softmax cache(v=int4)"), DecodeForm(64, 33)).reason == reason
    reason = "rows of 34 channels cannot be packed four to a byte; the nearest widths are 32 and 36"
    assert supports(parse("softmax cache(v=int2)"), DecodeForm(64, 34)).reason == reason
    assert supports(parse("softmax cache(v=int8)"), DecodeForm(64, 33)) is None


@pytest.mark.parametrize(
    ("mask", "keys"),
    [("causal & window(1024)", 1024), ("causal", 0), ("window(64) & lookahead(8)", 71), ("causal & (window(4) | global(2))", 0)],
)
def test_keys_that_one_query_sees(mask, keys):
    assert span(key_range(parse_expr(mask))) == keys


def test_splits_fill_the_machine():
    slots = 2 * 132
    assert split_count(512, 64, 132) == 1  # batch 64 of 8 key heads: there is enough to do
    assert split_count(8, 2048, 132) == 29  # one sequence: 232 programs of 264 at a time, nearly as many as 31 splits would fill
    assert split_count(8, 8, 132) == 2  # so short that a share would be less than four blocks
    assert split_count(1, 1, 132) == 1
    for programs in (1, 8, 100, 130, 264, 300):
        n = split_count(programs, 10000, 132)
        waves = -(-programs * n // slots)
        assert programs * n >= 0.45 * waves * slots or n >= 0.85 * 128
