"""Rounded queries and keys in TVM's prefill kernels: the numbers of the reference, and what is refused."""

from __future__ import annotations

import pytest
import torch
from precision_cases import GROUPS, Rounded
from prefill_kernels import attention

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm import decode
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.compile import compile_source, loaded
from attnopt.codegen.tvm.cpu import host, named
from attnopt.codegen.tvm.cuda import cuda_source
from attnopt.codegen.tvm.low_precision import PRODUCTS, tiles_for
from attnopt.codegen.tvm.prefill import emit, supports
from attnopt.codegen.tvm.tuning import family
from attnopt.ir.reference import attend
from attnopt.ir.spec import parse

FORM = Form(64, 64, "float32")
INT8 = "q=int8, k=int8"
LINE = f"softmax scale(0.125) precision({INT8}, {GROUPS}, k_smooth=0)"
WIDE, NARROW, OLD = named("sapphirerapids"), named("alderlake"), named("haswell")
CASES = {
    "by thread, with lse": Rounded(f"softmax scale(0.125) causal precision({INT8}, {GROUPS}, k_smooth=0)", width=(80, 72)),
    "by row, odd widths": Rounded(f"softmax scale(0.3) precision({INT8})", width=(7, 5), lengths=(10, 33)),
    "by block, empty rows": Rounded(
        f"softmax scale(0.125) k < q precision({INT8}, q_group=row // 64, k_group=k // 128, k_smooth=0)", lengths=(70, 140)
    ),
    "terms need what smoothing took out": Rounded(
        f"softmax scale(0.125) softcap(3.0) sink(0.5) offset(size(k) - size(q)) causal precision({INT8}, {GROUPS}, k_smooth=0)",
        lengths=(20, 150),
    ),
}
able = pytest.mark.skipif(
    missing() is not None or not any(host().has(x) for x in PRODUCTS), reason="no TVM, or no product of bytes on this CPU"
)


@able
@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_reference_does(name):
    torch.manual_seed(0)
    case, lse = CASES[name], "lse" in name
    q, k, v = case.tensors()
    q[0, 1, 3], k[0, 0, 4] = 0, 0  # a scale that would be zero
    o, log_sum = attention(case.spec, q, k, v, lse=lse)
    right = attend(parse(case.spec), q.double(), k.double(), v.double())
    torch.testing.assert_close(o.double(), right.output, atol=2e-5, rtol=1e-5)
    if lse:
        torch.testing.assert_close(log_sum.double(), right.lse, atol=2e-5, rtol=1e-5)
    plain = attend(parse(case.spec).with_(precision=None), q.double(), k.double(), v.double()).output
    assert (right.output - plain).abs().max() > 1e-3  # rounding shows, so the kernel rounds


@able
def test_sixteen_bits_and_vectors_of_256():
    if not host().has("avxvnni"):
        pytest.skip("no product of bytes in vectors of 256 bits")
    torch.manual_seed(0)
    case = CASES["by thread, with lse"]
    spec, form = parse(case.spec), Form(80, 72, "bfloat16")
    q, k, v = (x.bfloat16() for x in case.tensors())
    (tile,) = tiles_for(spec, NARROW, form)
    o = torch.full((*q.shape[:3], 72), float("nan"), dtype=torch.bfloat16)
    loaded(compile_source(emit(spec, form, tile, NARROW), NARROW))(q, k, v, o)
    right = attend(spec, q.double(), k.double(), v.double()).output
    torch.testing.assert_close(o.double(), right, atol=2e-2, rtol=1e-2)


def test_a_row_of_its_own_needs_no_groups():
    text = emit(parse(f"softmax precision({INT8})"), FORM, tiles_for(parse("softmax"), WIDE, FORM)[0], WIDE)
    assert not any(word in text for word in ("key_group", "query_group", "key_means", "shifts", "q_t[d, x * LANES + j] *"))
    assert "def coded_scores(" in text and "PRODUCT" in text
    assert family(parse(LINE), FORM) != family(parse("softmax scale(0.125)"), FORM)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("q=int4, k=int4", "q in int4 times k in int4: int8 times int8 is what this kernel has"),
        (f"{INT8}, p=fp16, v=fp16", "p in fp16 times v in fp16: on a CPU weights and values stay as they are"),
        (f"{INT8}, q_smooth=row // 128", "q is smoothed: this kernel takes the mean out of keys only"),
        (f"{INT8}, k_smooth=k // 64", "k is smoothed by the mean of all keys only"),
        (f"{INT8}, q_group=row // 128", "q_group=row // 128: groups must lie within blocks of 64 rows"),
        (f"{INT8}, k_group=k % 2", "k_group=k % 2: groups must lie within blocks of 128 rows"),
    ],
)
def test_refusals(options, said):
    assert supports(parse(f"softmax precision({options})"), FORM).reason == said


def test_refused_by_a_cpu():
    assert supports(parse(LINE), FORM, WIDE) is None
    assert supports(parse(LINE), FORM, NARROW) is None
    assert supports(parse(LINE), FORM, OLD).reason == "haswell has no product of bytes: AVX-512 VNNI and AVX-VNNI have one"
    blocks = parse(f"softmax precision({INT8}, q_group=row // 64)")
    assert supports(blocks, FORM, NARROW).reason == "no tile for alderlake holds the groups of q_group=row // 64 whole"


def test_other_kernels_refuse():
    assert "a cache says by itself" in decode.supports(parse(LINE), FORM).reason
    assert cuda_source(parse(LINE), FORM).reason == "this schedule rounds neither queries nor keys"
