"""The text of the decode family for CPUs: what a spec leaves of it, and what it refuses."""

from __future__ import annotations

import ast

import pytest

from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.tvm.cpu import named
from attnopt.codegen.tvm.decode import emit, supports
from attnopt.codegen.tvm.decode_tiles import DecodeTile, decode_tile
from attnopt.ir.spec import parse

WIDE, NARROW = named("sapphirerapids"), named("haswell")


def text(line, form=None, cpu=WIDE, rows=4):
    made = emit(parse(line), form or DecodeForm(64, 64, "float32"), decode_tile(cpu, rows), cpu)
    ast.parse(made)
    return made


def test_a_plain_spec_leaves_a_plain_kernel():
    made = text("softmax scale(0.125)")
    gone = (
        "K_STEP",
        "SHIFTS",
        "PAGES",
        "TOKENS",
        "lse: T",
        "mask_mod",
        "query_offset",
        "part_of",
        "DIGITS",
        "def exp2(",
        "operands",
    )
    assert [word for word in gone if word in made] == []
    assert "\n    q: T.handle, k: T.handle, v: T.handle,\n    o: T.handle,\n" in made
    assert "x[lane] = key_number(K, place, head, row_of(at), d * D_LANES, lane)" in made
    assert len(made.splitlines()) < 380


def test_arguments_follow_the_cache_and_the_spec():
    form = DecodeForm(64, 64, "float32", (("padding", "bool"),), True, lengths=True)
    made = text("softmax load(padding, b, 0, 0, k) cache(k=int8, v=fp8, layout=paged, page=16)", form)
    start = made.index("def attention(")
    names = [word.split(":")[0] for word in made[start : made.index("):", start)].split("(")[1].replace("\n", " ").split(", ")]
    held = ["k_scales", "k_zeros", "v_scales", "pages", "lengths"]
    assert [name.strip() for name in names if name.strip()] == ["q", "k", "v", *held, "p_padding", "o", "lse"]


def test_only_keys_that_are_seen_are_visited():
    made = text("softmax offset(size(k) - size(q)) causal & window(512)")
    assert "return q_first - 511" in made
    assert "first: T.int64 = whole(T.max(first_seen, 0), BLOCK)" in made


@pytest.mark.parametrize(
    ("line", "cpu", "dtype", "digits"),
    [
        ("softmax cache(k=int8, v=int8)", WIDE, "float32", 3),
        ("softmax cache(k=int4, v=int4)", WIDE, "bfloat16", 2),
        ("softmax cache(k=int8, v=int8)", NARROW, "float32", 0),  # has no such product
        ("softmax cache(k=int8, v=int8, group=16)", WIDE, "float32", 0),  # steps within a key
        ("softmax cache(v=int8)", WIDE, "float32", 0),
    ],
)
def test_integer_products(line, cpu, dtype, digits):
    """Queries of 32 bits take three digits, of 16 bits two; other keys are converted."""
    made = text(line, DecodeForm(64, 64, dtype), cpu)
    assert ("vpdpbusd" in made) == (digits > 0)
    assert (f"K_DIGITS = {digits}" in made) == (digits > 0)


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
        ("softmax cache(k=int3)", "int3 codes have no packed form; the nearest are int2 and int4"),
        ("softmax cache(k=int8, v=int1)", "the kernels read no int1 codes"),
    ],
)
def test_refusals(line, reason):
    assert supports(parse(line), DecodeForm(64, 64)).reason == reason


def test_widths():
    assert (
        supports(parse("softmax cache(v=int4)"), DecodeForm(64, 33)).reason
        == "rows of 33 channels cannot be packed two to a byte; the nearest widths are 32 and 34"
    )
    assert supports(parse("softmax"), DecodeForm(64, 257)).reason == "rows of 64 and 257 channels; up to 256 fit"
    assert supports(parse("softmax cache(k=int8, group=24)"), DecodeForm(48, 48)) is None  # vectors of 8 channels fit such groups


@pytest.mark.parametrize(
    ("cpu", "rows", "tile"),
    [
        (WIDE, 1, DecodeTile(1, 16)),
        (WIDE, 3, DecodeTile(4, 4)),
        (WIDE, 40, DecodeTile(8, 2)),
        (NARROW, 4, DecodeTile(4, 2, lanes=8)),
        (named("apple-m1"), 4, DecodeTile(4, 4, lanes=4)),
    ],
)
def test_tiles_fill_half_of_the_registers(cpu, rows, tile):
    assert decode_tile(cpu, rows) == tile
    assert decode_tile(cpu, rows, windowed=True).block < tile.block


def test_operands_that_are_called_as_something_in_the_kernel():
    form = DecodeForm(64, 64, "float32", (("weights", "float32"), ("bias", "float32")))
    made = text("softmax add(load(weights, b, h, row, k)) add(load(bias, b, h, row, k))", form)
    assert "p_weights_operand: T.handle, p_bias: T.handle," in made
    assert "score = score + weights_operand[b, h, q, k]" in made
