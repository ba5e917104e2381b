"""The source that FlexAttention compiles: golden text, and at every index what `evaluate` says."""

from __future__ import annotations

import pytest
import torch

from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.grammar import parse_expr
from attnopt.ir.spec import parse
from attnopt.runtime.flex import defined
from attnopt.runtime.flex_source import attend_source, mask_source, sayable, split_mask

GOLDEN = {
    "softmax": """\
def attend(q, k, v, block_mask):
    return flex_attention(q, k, v, score_mod=None, block_mask=block_mask, scale=1.0, enable_gqa=q.shape[1] != k.shape[1])
""",
    "softmax scale(0.1) softcap(50.0) add(load(bias.0, 0, h, row, k)) causal & load(seen, b, 0, 0, k)": """\
def attend(q, k, v, block_mask, x_bias·0, x_seen):
    def score_mod(score, b, h, row, col):
        score = 50.0 * torch.tanh(score / 50.0)
        score = score + x_bias·0[(0), h, row, col]
        score = torch.where(x_seen[b, (0), (0), col], score, -float('inf'))
        return score
    return flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=0.1, enable_gqa=q.shape[1] != k.shape[1])
""",
    "softmax mod(tanh) scale(2.0) add(0.5 * (k - q))": """\
def attend(q, k, v, block_mask):
    def score_mod(score, b, h, row, col):
        score = torch.tanh(score)
        score = score * (2.0)
        score = score + ((0.5) * (col - row))
        return score
    return flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=1.0, enable_gqa=q.shape[1] != k.shape[1])
""",
}


@pytest.mark.parametrize("line", GOLDEN)
def test_source_of_a_spec(line):
    assert attend_source(parse(line)) == GOLDEN[line]


def test_source_of_a_mask():
    static, loaded = split_mask(parse("softmax causal & load(seen, b, 0, 0, k) & (window(4) | global(2))"))
    assert (str(static), str(loaded)) == ("causal & (window(4) | global(2))", "load(seen, b, 0, 0, k)")
    assert static is not None
    assert mask_source(static) == (
        "def mask_mod(b, h, row, col):\n    return ((col <= row) & (((row - col) < (4)) | (col < (2))))\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "causal", "window(4) & lookahead(3)", "global(3) | global_query(2)", "chunk(4)", "near_blocks(3, 1)", "power_blocks(2)",
        "dilated(3)", "diagonal", "neighborhood(3, 1, 1, 12, 1)", "~(k <= q) | q == 0", "(k - q) // 3 == -1", "(k - q) % 4 == 3",
        "min(k, 3) + max(q, 2) == 5", "min(k, q) == 1", "abs(k - q) < 3", "k * 0.5 < q", "where(h < 2, causal, window(2))",
        "k < inf", "int(float(k) * 0.7) == 2", "pow(2.0, -h) > 0.3", "k != q & b == 1", "-(k - q) > 1", "(k + 1) / (q + 1) > 0.5",
        "(k <= q) + (k <= 3) == 2", "(k <= q) * 2 > 1", "floor(k * 0.3) == 1", "sqrt(k) > 2",
    ],
)  # fmt: skip
def test_printed_expressions_mean_the_same(text):
    expr, grid = parse_expr(text), Grid(2, 4, 12, 12)
    found = defined(mask_source(expr))(*(grid.index(name) for name in ("b", "h", "row", "k")))
    torch.testing.assert_close(torch.as_tensor(found).expand(2, 4, 12, 12), evaluate(expr, grid).expand(2, 4, 12, 12))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("softmax scale(0.1) softcap(50.0) causal", True),
        ("softmax mod(relu)", True),
        ("softmax k < size(k)", False),
        ("softmax last(4)", False),
        ("softmax mix(table)", False),
        ("softmax mod(log1p)", False),
    ],
)
def test_what_can_be_said(line, said):
    assert sayable(parse(line)) == said
