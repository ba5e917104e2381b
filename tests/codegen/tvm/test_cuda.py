"""CUDA source of specs: what it computes, thread by thread on a CPU, and what is refused."""

from __future__ import annotations

import shutil
from itertools import chain

import pytest
import torch
from cuda_on_cpu import run
from prefill_cases import TABLE, exact, tensors, tolerance

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm.cuda import BLOCK_Q, cuda_source
from attnopt.codegen.tvm.operand_buffers import buffer_name
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse

pytest.importorskip("tvm", reason="TVM is not installed")

TRIED = (
    "grouped",
    "window_and_padding",
    "bias_and_mask",
    "sink_per_head",
    "first_row_mean",
    "last_queries",
    "causal_buckets",
    "half",
)


@pytest.mark.sampled(4)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("name", TRIED)
def test_numbers(name, tmp_path):
    case = TABLE[name]
    (q, k, v), rest = tensors(case)
    spec = parse(case.spec)
    operands = tuple((x, str(rest[x].dtype).removeprefix("torch.")) for x in spec.operands)
    source = cuda_source(spec, Form(q.shape[3], v.shape[3], case.dtype, operands, lse=False))
    assert isinstance(source, str), source
    o = torch.full((*q.shape[:3], v.shape[3]), torch.nan, dtype=q.dtype)
    named = {"q": q, "k": k, "v": v, "o": o} | {buffer_name(x): rest[x] for x in spec.operands}
    values = {f"{x}_ptr": tensor for x, tensor in named.items()}
    values |= {"n_b": q.shape[0], "n_h": q.shape[1], "n_g": k.shape[1], "n_e": v.shape[1], "n_q": q.shape[2], "n_k": k.shape[2]}
    values |= {
        f"s_{x}{axis}": named[x].stride(at)
        for x, axes in (("q", "bhm"), ("k", "bhn"), ("v", "bhn"))
        for at, axis in enumerate(axes)
    }
    strides = ([(f"{part}_{buffer_name(x)}_{at}", number) for at, number in enumerate(numbers)]
               for x in spec.operands for part, numbers in (("s", rest[x].stride()), ("n", rest[x].shape)))  # fmt: skip
    values |= dict(chain.from_iterable(strides))
    run(source, (-(-q.shape[2] // BLOCK_Q), q.shape[1], q.shape[0]), BLOCK_Q, values, tmp_path)
    torch.testing.assert_close(o.double(), exact(case), atol=tolerance(case), rtol=tolerance(case))


def test_what_the_family_refuses():
    assert isinstance(cuda_source(parse("sigmoid"), Form(64, 64)), Refusal)


def test_the_head_says_how_to_launch_it():
    source = cuda_source(parse("softmax scale(0.125) causal"), Form(64, 64, "float16"))
    assert source.startswith("// Attention: softmax scale(0.125) causal\n")
    assert "Launch (ceil(queries / 64), heads, batch) blocks of 64 threads" in source
    assert "half* __restrict__ q_ptr" in source
