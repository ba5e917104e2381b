"""The attention part of the quantisation benchmark: its variants, what they stand for, and the table that it writes."""

from __future__ import annotations

import torch
from quantize.attention import Loss, products, reference_operator, text_of, variants

from attnopt.codegen.triton.prefill import Form, supports
from attnopt.ir.reference import reference
from attnopt.ir.spec import parse

WITH_KERNELS = {
    "int8, fp16", "int8, fp8", "int8, fp8, v smoothed", "int8, fp8, k not smoothed", "int8, fp8, scales per block",
}  # fmt: skip


def test_variants_and_their_kernels():
    made = variants()
    assert len(set(map(str, made.values()))) == len(made) == 11
    assert {
        name for name, clause in made.items() if supports(parse(f"softmax {clause}"), Form(64, 64)) is None
    } == WITH_KERNELS  # fmt: skip
    assert "k_smooth" not in str(made["int8, fp8, k not smoothed"])
    assert "q_group=row // 128, k_group=k // 64" in str(made["int4, fp8, scales per block"])
    assert "smooth" not in str(made["int4, fp8, nothing smoothed"])


def test_the_operator_computes_the_meaning_of_a_spec():
    q, k, v = torch.randn(1, 2, 9, 8), torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8)
    line = f"softmax scale(0.3) causal {variants()['int4, fp8']}"
    torch.testing.assert_close(reference_operator(q, k, v, [], line), reference(line, q, k, v))


def test_rows_of_padding_do_not_count():
    got, wanted = torch.ones(1, 1, 3, 2), torch.full((1, 1, 3, 2), 2.0)
    wanted[:, :, 2] = 1e9
    sums = products(got, wanted, torch.tensor([[True, True, False]]))
    assert sums.tolist() == [8.0, 4.0, 16.0, 4.0]


def test_the_table():
    row = Loss("code-lm", "int8, fp8", 0.9997, 0.9998, 0.02, 1e-4, 1e-5, 15.9, "Triton")
    text = text_of([row], ["note"])
    assert "| code-lm | int8, fp8 | 0.999700 | 0.999800 | 2.00e-02 | 1.00e-04 ± 1e-05 | 15.9000 | Triton |" in text
    assert "least cosine 0.999700, over 0.999" in text
