"""What the kernels do, pass by pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toy_target import SHAPE, TOY

from attnopt.codegen import SINGLE
from attnopt.cost.kernels import KERNELS, phases
from attnopt.cost.problem import Problem
from attnopt.ir.spec import parse

CPU = replace(TOY, kind="cpu", units=1)


def passes(kernel, line="softmax scale(0.1)", target=TOY, heads_first=True, **shape):
    return phases(kernel, Problem(parse(line), {**SHAPE, **shape}, "float32", heads_first), target)


def test_every_lowering_is_known():
    assert {x.name for x in SINGLE} <= KERNELS.keys()


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("target", [TOY, CPU], ids=["gpu", "cpu"])
def test_no_kernel_computes_less_than_what_is_visible(kernel, target):
    line = "softmax scale(0.1) causal & window(64)"
    made = passes(kernel, line, target)
    visible = 2 * (64 * 65 / 2 + 192 * 64)
    assert sum(p.flops for p in made) >= 2 * visible * 128
    assert sum(p.bytes + p.rereads for p in made) >= 4 * (2 * 256 * 128 + 256 * 128)


def test_tiles_follow_the_number_of_queries_on_a_cpu():
    rows = {q: passes("sdpa", target=CPU, q=q)[0].rows for q in (1, 32, 191, 192, 767, 768)}
    assert rows == {1: 1, 32: 32, 191: 32, 192: 64, 767: 64, 768: 256}


def test_heads_of_a_group_share_keys_where_there_are_few_queries():
    (one,) = passes("sdpa", q=1, k=4096, h=8, g=2)
    assert one.rereads == 0  # four heads of a group are rows of one tile
    assert one.tasks == 8  # 8 heads fill 4 units; no need to split keys
    (few,) = passes("sdpa", q=1, k=4096, h=2, g=2)
    assert few.tasks == TOY.units


def test_other_value_widths_are_spelled_out_on_a_cpu():
    assert [p.what for p in passes("sdpa", target=CPU, e=32, g=2)] == ["products", "scores", "softmax", "products"]


def test_grouped_heads_are_repeated_where_the_kernel_takes_none():
    assert passes("sdpa-repeated")[0].what == passes("ort-mha")[0].what == passes("eager")[0].what == "repeat"
    assert passes("sdpa-repeated", g=2) == passes("sdpa", g=2)


def test_chunks_see_their_band_only():
    line = "softmax scale(0.1) causal & window(64)"
    *_, attended = passes("local-sdpa", line, q=4096, k=4096)
    assert attended.flops == 2 * 2 * 64 * (64 * 128) * 128  # 64 chunks of 64 rows beside 128 keys, two heads
    twice = passes("local-sdpa", line, q=8192, k=8192)[-1]
    assert twice.flops == 2 * attended.flops


def test_operators_that_read_rows_turn_what_comes_by_head():
    turned = [p for p in passes("ort-gqa", "softmax causal") if p.what == "transpose"]
    assert len(turned) == 2
    assert len([p for p in passes("ort-gqa", "softmax causal", heads_first=False) if p.what == "transpose"]) == 1
    assert len([p for p in passes("onnx-attention", heads_first=False) if p.what == "transpose"]) == 1


def test_what_is_hidden_is_not_normalised():
    whole, causal = (passes("ort-gqa", line)[-1] for line in ("softmax", "softmax causal"))
    assert causal.flops == whole.flops
    assert causal.operations == whole.operations * 257 / 512


def test_linear_attention_has_no_scores():
    (state,) = passes("sdpa", "linear(elu1)")
    assert state.flops == 2 * 512 * (2 * 64 * 64 + 64)


def test_keys_are_rounded_before_a_cpu_multiplies_them():
    line = "softmax scale(0.1) precision(q=int8, k=int8, k_smooth=0)"
    codes, attended = passes("tvm-prefill", line, CPU)
    (plain,) = passes("tvm-prefill", target=CPU)
    assert codes.launches == 0 and codes.bytes > 0
    assert (attended.flops, attended.more, attended.more_dtype) == (plain.flops / 2, plain.flops / 2, "float32")
