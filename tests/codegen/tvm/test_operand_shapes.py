"""Operands that are too small are refused before a kernel reads beside them."""

from __future__ import annotations

import pytest

from attnopt.codegen.tvm.operand_shapes import check_operands
from attnopt.errors import InputMismatch
from attnopt.ir.spec import parse

BIAS = "softmax add(load(bias, b, h, row, k))"


@pytest.mark.parametrize(
    ("line", "shapes", "said"),
    [
        (BIAS, {"bias": (2, 4, 8, 12)}, None),
        (BIAS, {"bias": (2, 4, 8, 11)}, r"operand 'bias' of shape \[2, 4, 8, 11\] is read from 0 to 11 along dimension 3"),
        (BIAS, {"bias": (1, 4, 8, 12)}, "is read from 0 to 1 along dimension 0"),
        (BIAS, {"bias": (8, 12)}, r"operand 'bias' is \[8, 12\], and is read by 4 indices"),
        ("softmax add(load(table, k - q + 7, h))", {"table": (19, 4)}, None),
        ("softmax add(load(table, k - q + 6, h))", {"table": (19, 4)}, "is read from -1 to 17 along dimension 0"),
        ("softmax add(load(table, min(abs(k - q), 5)))", {"table": (6,)}, None),
        ("softmax offset(4) load(ids, b, q) == load(ids, b, k)", {"ids": (2, 12)}, None),
        ("softmax offset(5) load(ids, b, q) == load(ids, b, k)", {"ids": (2, 12)}, "is read from 5 to 12 along dimension 1"),
        ("softmax add(load(table, load(ids, b, k)))", {"table": (2,), "ids": (2, 12)}, None),
        ("softmax blocks(3, 5, operand=list)", {"list": (1, 4, 3, 3)}, None),
        ("softmax blocks(3, 5, operand=list)", {"list": (3, 4, 3, 3)}, r"operand 'list' is \[3, 4, 3, 3\], not \[1 or 2, 1 or 4, 3, 3\]"),
        ("softmax blocks(3, 5, operand=list)", {"list": (3, 3)}, r"operand 'list' is \[3, 3\], not"),
    ],
)  # fmt: skip
def test_what_is_read(line, shapes, said):
    if said is None:
        check_operands(parse(line), 2, 4, 8, 12, shapes)
    else:
        with pytest.raises(InputMismatch, match=said):
            check_operands(parse(line), 2, 4, 8, 12, shapes)


def test_nothing_is_read_of_nothing():
    check_operands(parse(BIAS), 2, 4, 0, 12, {"bias": (2, 4, 0, 12)})
