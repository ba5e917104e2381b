"""The emitted file of a spec: one as golden text, what others hold and leave out, and what the family refuses."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from attnopt.codegen.triton.expressions import pointer
from attnopt.codegen.triton.prefill import Form, emit, pieces, supports
from attnopt.codegen.triton.tiles import Tile
from attnopt.ir.spec import parse

GOLDEN = Path(__file__).parent / "causal_window.txt"
TILE = Tile(128, 64, 4, 3)


def source(line, width=64, value_width=64, operands=(), lse=False, dtype="float16"):
    spec, form = parse(line), Form(width, value_width, dtype, operands, lse)
    assert supports(spec, form) is None
    return emit(spec, form, TILE)


def test_the_file_of_a_window():
    assert source("softmax scale(0.125) causal & window(512)") == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "there", "absent"),
    [
        ("softmax", ["kv_len // BLOCK_K"], ["mask_mod", "key_range", "m_empty", "query_offset"]),
        ("softmax causal", ["return 0, q_last + 1", "i_m = q_blocks - 1 - i_m"], ["m_empty", "score_mod", "LEFT", "row +"]),
        ("softmax causal empty(zero)", ["k <= q"], ["m_empty"]),
        ("softmax k < q empty(zero)", ["m_empty"], ["b_total"]),
        ("softmax k < q", ["m_empty", "b_total / kv_len"], []),
        ("softmax chunk(64)", ["q_first // 64 * 64, q_last // 64 * 64 + 64"], ["floor_divide", "i_m = q_blocks - 1"]),
        ("softmax offset(size(k) - size(q)) chunk(48)", ["floor_divide(q, 48)", "offset = query_offset(q_len, kv_len)"], []),
        ("softmax causal & (window(9) | global(4))", ["leading = ", "return 4"], []),
        ("softmax scale(2.0) softcap(30.0)", ["30.0 * tanh(score *", "SCALE = tl.constexpr(2.0)"], ["mask_mod"]),
        ("softmax scale(-1.0)", ["score * (-1.0)"], []),
        ("softmax sink(0.5)", ["b_sink"], ["m_empty"]),
        ("softmax dilated(3)", ["mask_mod"], ["inner_mask_mod", "PHASES", "if EDGE"]),
        ("softmax causal & dilated(3)", ["inner_mask_mod", "if EDGE"], []),
    ],
)
def test_a_file_is_as_short_as_its_spec_is_simple(line, there, absent):
    text = source(line)
    assert [part for part in there if part not in text] == []
    assert [part for part in absent if part in text] == []


@pytest.mark.parametrize("line", ["softmax", "softmax causal & window(9)", "softmax softcap(2.0) causal & dilated(3) sink(0.5)"])
def test_a_file_imports_torch_and_triton_only_and_has_short_lines(line):
    text = source(line, 96, 80, lse=True)
    names = [alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names]
    assert names == ["torch", "triton", "triton.language"]
    assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    assert max(map(len, text.splitlines())) <= 130


def test_operands_are_parameters_by_name():
    line = "softmax add(alibi) add(load(bias.0, 0, h, row, k)) causal & padding"
    text = source(line, operands=(("slopes", "float32"), ("bias.0", "float16"), ("padding", "bool")))
    assert "def attention(q, k, v, slopes, bias_0, padding, o=None):" in text
    assert "p_slopes, s_slopes_0, p_bias_0, s_bias_0_1, s_bias_0_2, s_bias_0_3, p_padding, s_padding_0, s_padding_1," in text
    assert "bias_0 = tl.cast(tl.load(place, mask=m_k, other=0), tl.float32)" in text
    assert "slopes = tl.load(place)" in text


def test_buckets_are_whole_numbers():
    """Those of T5: 16 for each direction, exact up to 8, logarithmic up to 128."""
    text = source("softmax add(load(table, bucket(8, 2.772588722239781), h))", operands=(("table", "float32"),))
    assert "distance = tl.abs(k - q)\n    bucket = tl.minimum(distance, 8)\n" in text
    assert re.findall(r"distance >= (\d+)", text) == ["12", "16", "23", "32", "46", "64", "91"]
    assert "bucket += tl.where(k > q, 16, 0)\n" in text
    assert "tl.log" not in text


def test_names_that_are_taken():
    assert [pointer(name) for name in ("bias", "q", "rows", "a.b")] == ["p_bias", "p_q_operand", "p_rows_operand", "p_a_b"]


@pytest.mark.parametrize(
    ("width", "parts"),
    [(16, (16, 0)), (5, (16, 0)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (72, (64, 16)), (100, (128, 0)), (24, (32, 0)),
     (112, (128, 0)), (160, (128, 32)), (192, (128, 64)), (200, (256, 0)), (256, (256, 0))],
)  # fmt: skip
def test_widths_in_powers_of_two(width, parts):
    assert pieces(width) == parts
    assert sum(parts) >= width


@pytest.mark.parametrize(
    ("line", "form", "reason"),
    [
        ("sigmoid", Form(64, 64), "the normaliser is sigmoid, not softmax"),
        ("softmax rotary(64)", Form(64, 64), "position is not part of this kernel"),
        ("softmax precision(q=int8)", Form(64, 64), "q in int8 times k in fp32: int8 times int8 is what this kernel has"),
        ("softmax heads(8, 2, map=table)", Form(64, 64), "query heads are mapped to key heads by a table"),
        ("softmax", Form(64, 64, "float64"), "dtype float64"),
        ("softmax", Form(64, 288), "rows of 64 and 288 channels; up to 256 fit"),
        ("softmax mix(table)", Form(64, 64), "score term 'mix(table)' is not printed for Triton"),
        ("softmax k < size(s77)", Form(64, 64), "the length 's77' is not known to a kernel"),
        ("softmax padding", Form(64, 64), "the type of 'padding' is not known"),
        ("softmax add(load(table, int(log(k + 1.0))))", Form(64, 64, operands=(("table", "float32"),)),
         "'int' of a function that GPUs round in their own way"),
        ("softmax add(pow(k + 1.0, 2.0))", Form(64, 64), "a power is printed only of a positive constant"),
        ("softmax add((k * 0.5) % 2.0)", Form(64, 64), "'mod' of reals is not printed for Triton"),
    ],
)  # fmt: skip
def test_refusals(line, form, reason):
    said = supports(parse(line), form)
    assert said is not None
    assert said.reason == reason
