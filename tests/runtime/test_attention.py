"""attnopt.attention against the reference: by scaled_dot_product_attention, by FlexAttention, by the reference itself."""

from __future__ import annotations

import pytest
import torch

import attnopt
from attnopt.errors import InputMismatch, SpecSyntaxError
from attnopt.ir.spec import parse
from attnopt.runtime.attention import FLEX_SCORES, backend_for, by_flex, by_reference, by_sdpa

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
SEEN = torch.tensor([[[[True, True, False, True, True, False, True]]], [[[False] * 7]]])
BACKENDS = {
    by_sdpa: [
        "softmax", "softmax scale(0.25)", "softmax scale(0.25) causal", "softmax causal & window(3) scale(0.25)",
        "softmax scale(0.25) load(seen, b, 0, 0, k)", "softmax scale(0.25) load(seen, b, 0, 0, k) empty(zero)",
        "softmax scale(0.25) add(load(bias, b, h, row, k)) causal", "softmax add((k - q) * 0.5) add(load(bias, b, h, row, k))",
        "softmax k < q", "softmax heads(4, 2) width(16, 24)",
    ],
    by_flex: ["softmax scale(0.25) softcap(2.0) causal"],
    by_reference: [
        "softmax scale(0.25) softcap(2.0) load(seen, b, 0, 0, k)",  # a row that sees nothing averages: FlexAttention cannot
        "softmax softcap(2.0) k < size(k) - 1 empty(zero)", "sigmoid scale(0.25)", "softmax scale(0.25) sink(0.5)",
        "softmax offset(3) causal", "softmax scale(load(temperature, h)) k < q", "softmax heads(4, 2, map=to)",
    ],
}  # fmt: skip
CASES = [(backend, line) for backend, lines in BACKENDS.items() for line in lines]


@pytest.mark.parametrize(("backend", "line"), CASES, ids=[line for _, line in CASES])
@pytest.mark.parametrize("q_len", [5, 7])
def test_computes_what_the_reference_does(backend, line, q_len):
    q, k, v = torch.randn(2, 4, q_len, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 24)
    known = {
        "seen": SEEN, "bias": torch.randn(2, 4, q_len, 7), "temperature": torch.rand(4), "to": torch.tensor([1, 0, 0, 1]),
    }  # fmt: skip
    spec = parse(line)
    loaded = {name: known[name] for name in spec.operands}
    assert backend_for(spec, q, k, v) is backend
    doubles = {name: x.double() if x.is_floating_point() else x for name, x in loaded.items()}
    wanted = attnopt.reference(spec, q.double(), k.double(), v.double(), **doubles)
    got = attnopt.attention(q, k, v, spec=line, **loaded)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    q, k, v = (torch.randn(2, 4, 7, 16, dtype=dtype) for _ in range(3))
    got = attnopt.attention(q, k, v, "softmax scale(0.25) causal & window(3)")
    wanted = attnopt.reference("softmax scale(0.25) causal & window(3)", q.double(), k.double(), v.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


def test_blocks_are_skipped_where_that_is_worth_compiling():
    spec = parse("softmax scale(0.25) causal & window(256)")
    shapes = [torch.empty(1, 1, length, 16, device="meta") for length in (2047, 2048)]
    assert [backend_for(spec, x, x, x) for x in shapes] == [by_sdpa, by_flex]
    assert shapes[1].shape[2] ** 2 == FLEX_SCORES
    assert backend_for(parse("softmax scale(0.25) causal"), *[shapes[1]] * 3) is by_sdpa
    narrow = shapes[1][..., :8]
    assert backend_for(spec, narrow, narrow, narrow) is by_sdpa


X = torch.randn(2, 4, 5, 16)


@pytest.mark.parametrize(
    ("spec", "shapes", "error", "says"),
    [
        ("softmax causl", (X, X, X), SpecSyntaxError, "column 9"),
        ("causal", (X, X, X), SpecSyntaxError, "a normaliser"),
        ("softmax", (X, X[..., :8], X), InputMismatch, "q and k differ in width"),
        ("softmax", (X, X[:, :3], X[:, :3]), InputMismatch, "no multiple"),
        ("softmax", (X[0], X, X), InputMismatch, "q has 3 dimensions"),
        ("softmax heads(8)", (X, X, X), InputMismatch, r"the spec says heads\(8\)"),
        ("softmax load(seen, b, 0, 0, k)", (X, X, X), InputMismatch, "'seen', which was not given"),
        ("softmax softcap(2.0) add(load(bias, b, h, row, k))", (X, X, X), InputMismatch, "'bias', which was not given"),
    ],
)
def test_bad_input(spec, shapes, error, says):
    with pytest.raises(error, match=says):
        attnopt.attention(*shapes, spec=spec)
