"""The emitted file of a spec: what it holds and leaves out, and what the family refuses."""

from __future__ import annotations

import pytest

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm.cpu import named
from attnopt.codegen.tvm.prefill import emit, supports
from attnopt.codegen.tvm.tiles import Tile, narrowed, tiles
from attnopt.ir.spec import parse

OPERANDS = (
    ("bias", "float16"),
    ("padding", "bool"),
    ("document", "int64"),
    ("slopes", "float32"),
    ("table", "float32"),
    ("list", "bool"),
)


def source(line, cpu="haswell", **form):
    spec, asked, machine = parse(line), Form(64, 64, **{"dtype": "float32", "operands": OPERANDS, **form}), named(cpu)
    assert supports(spec, asked) is None
    return emit(spec, asked, tiles(machine, asked)[0], machine)


@pytest.mark.parametrize(
    ("line", "there", "absent"),
    [
        ("softmax", ["seen[3] = kv_len"], ["mask_mod", "first_key", "mean", "score_mod"]),
        ("softmax causal", ["return q_last + 1", "q_blocks - 1 - turn // 2"], ["mean", "inner_mask_mod", "operands"]),
        ("softmax causal & window(512)", ["(k <= q) & (q - k < 512)", "return q_first - 511"], ["leading"]),
        ("softmax causal & (window(9) | global(4))", ["return 4"], []),
        ("softmax k < q", ["mean[e]"], []),
        ("softmax k < q empty(zero)", [], ["mean[e]"]),
        ("softmax padding", ["padding[b, k]"], ["held"]),
        ("softmax blocks(48, 32, operand=list)", ["chosen: T.let", "list[T.min(b, list.shape[0] - 1)"], ["tiles", "may_match", "parts[1"]),
        ("softmax document", ['document_q == T.cast(document[b, k], "int32")', "held_whole[0, i] ="], ["tiles"]),
        ("softmax add(load(bias, b, h, row, k))", ["tiles[0, n, i] =", "score + bias_qk"], ["held"]),
        ("softmax add(alibi) causal", ["slopes[h] * (k - q)"], ["held", "tiles"]),
        ("softmax add(load(table, bucket(8, 2.772588722239781), h))", ["def bucket(q, k):", "distance >= 12"], ["T.log("]),
    ],
)  # fmt: skip
def test_a_file_is_as_short_as_its_spec_is_simple(line, there, absent):
    text = source(line)
    assert [part for part in there if part not in text] == []
    assert [part for part in absent if part in text] == []


def test_halves_are_widened_once_for_a_block():
    assert "k_s[n, d] = T.cast(k[" in source("softmax", dtype="bfloat16")
    assert "k_s" not in source("softmax")


@pytest.mark.parametrize(("cpu", "lanes"), [("sapphirerapids", 16), ("haswell", 8), ("apple-m1", 4)])
def test_tiles_fit_the_vectors_of_the_machine(cpu, lanes):
    assert f"LANES = {lanes}\n" in source("softmax", cpu)
    for tile in tiles(named(cpu), Form(64, 64)):
        assert tile.block_q % lanes == 0 and max(tile.keys, tile.channels) * tile.block_q * 4 <= 1024


def test_a_narrow_tile_where_a_wide_one_would_be_half_empty():
    wide, half, narrow = table = (Tile(64, 64, 4, 4), Tile(32, 64, 8, 8), Tile(16, 64, 8, 8))
    machine = named("sapphirerapids")
    found = [narrowed(table, wide, queries, machine) for queries in (1, 17, 33, 64, 65, 90, 129, 250, 300)]
    assert found == [narrow, half, wide, wide, half, half, half, wide, wide]


@pytest.mark.parametrize(
    ("line", "form", "reason"),
    [
        ("sigmoid", Form(64, 64), "the normaliser is sigmoid, not softmax"),
        ("softmax rotary(64)", Form(64, 64), "position is not part of this kernel"),
        ("softmax precision(q=int8)", Form(64, 64), "precision is not part of this kernel"),
        ("softmax pages(64, 4)", Form(64, 64), "pages chooses keys from the scores; a kernel takes blocks(m, n, operand=…)"),
        ("softmax heads(8, 2, map=table)", Form(64, 64), "query heads are mapped to key heads by a table"),
        ("softmax", Form(64, 64, packed=True), "sequences that stand one after the other in one tensor"),
        ("softmax", Form(64, 64, "float64"), "dtype float64"),
        ("softmax", Form(64, 288), "rows of 64 and 288 channels; up to 256 fit"),
        ("softmax padding", Form(64, 64), "the type of 'padding' is not known"),
    ],
)  # fmt: skip
def test_refusals(line, form, reason):
    said = supports(parse(line), form)
    assert said is not None
    assert said.reason == reason
