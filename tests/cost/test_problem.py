"""The numbers that all kernels' prices are made of."""

from __future__ import annotations

import pytest
from toy_target import SHAPE

from attnopt.cost.problem import Problem
from attnopt.ir.spec import parse


def problem(line, dtype="float32", **shape):
    return Problem(parse(line), {**SHAPE, **shape}, dtype)


def test_pairs_in_blocks_and_by_selection():
    assert problem("softmax causal").pairs() == 256 * 257 / 2
    assert problem("softmax causal").pairs(128, 128) == 3 * 128 * 128
    assert problem("softmax top_keys(4)").pairs(128, 128) == 256 * 4
    assert problem("softmax causal offset(load(past))", q=1).pairs(128, 128) == 256  # the last query sees all


def test_bytes():
    plain = problem("softmax", "float16")
    assert (plain.width, plain.row_bytes) == (2, 256)
    assert plain.keys_bytes == 256 * 256
    assert plain.queries_bytes == 2 * 256 * (64 + 64) * 2
    assert problem("softmax cache(k=int8, v=int4)", "float16").row_bytes == 64 + 32


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("softmax", 0),
        ("softmax cache(k=int8, v=int8)", 256),
        ("softmax cache(k=int8)", 128),
        ("softmax cache(k=bf16, v=bf16)", 0),
    ],
)
def test_conversions(line, wanted):
    assert problem(line, "float16").conversions == wanted


def test_product_type():
    assert problem("softmax", "float16").product_type == "float16"
    assert problem("softmax precision(q=int8, k=int8)", "float16").product_type == "int8"
    assert problem("softmax precision(k=int4)", "float16").product_type == "float16"  # the other side is not rounded
    assert problem("softmax precision(q=fp8, k=fp8)", "float16").product_type == "float8"


def test_value_type():
    assert problem("softmax precision(q=int8, k=int8)", "bfloat16").value_type == "bfloat16"
    assert problem("softmax precision(p=fp16, v=fp16)", "bfloat16").value_type == "float16"
    assert problem("softmax precision(p=fp8, v=fp8)", "bfloat16").value_type == "float8"


def test_rounding_is_work_on_scores():
    plain = problem("softmax").per_score
    assert problem("softmax precision(q=int8, k=int8)").per_score == plain + 2
    assert problem("softmax precision(q=int8, k=int8, p=fp8, v=fp8)").per_score == plain + 3
    assert problem("softmax precision(q=int8, k=int8)").conversions == 0  # codes are made once, before
