"""Decode kernels of TVM compute what the reference does, into outputs that hold NaN before, on any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from decode_cases import LAST, TABLE, DecodeCase, cached, exact, tensors, tolerance

from attnopt.ir.kv_cache import Cache, attend_cache, pack_cache

pytest.importorskip("tvm", reason="TVM is not installed")

from decode_kernels import call, run

from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.tvm.compile import assembly, compile_source, loaded
from attnopt.codegen.tvm.cpu import host, named
from attnopt.codegen.tvm.decode import emit
from attnopt.codegen.tvm.decode_tiles import DecodeTile, decode_tile
from attnopt.ir.spec import parse

AVX2 = named("haswell")
WITH_AVX2 = pytest.mark.skipif(not host().has("avx2"), reason="this machine has no AVX2")


def check(case, found):
    o, lse = found
    torch.testing.assert_close(o.double(), exact(case).output, atol=tolerance(case), rtol=tolerance(case))
    torch.testing.assert_close(lse.double(), exact(case).lse, atol=tolerance(case), rtol=tolerance(case))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", TABLE)
def test_computes_what_the_reference_does(name):
    check(TABLE[name], run(TABLE[name]))


@pytest.mark.sampled(2)
@WITH_AVX2
@pytest.mark.parametrize("name", ["plain", "bfloat16", "softcap_sink", "int8", "int4_symmetric", "kivi", "fp8"])
def test_with_vectors_of_eight(name):
    check(TABLE[name], run(TABLE[name], cpu=AVX2))


WIDER = {
    "int8": cached("k=int8, v=int8", f"{LAST} causal", heads=(8, 2), width=(128, 64), lengths=(2, 700)),
    "int8_symmetric": cached("k=int8, v=int8, levels=symmetric", heads=(3, 1), width=(64, 64), lengths=(1, 300)),
    "int4": cached("k=int4, v=int4, levels=symmetric", heads=(4, 1), width=(128, 128), lengths=(1, 300)),
    "int4_half": cached("k=int4, v=int4", heads=(4, 2), width=(64, 64), lengths=(1, 300), dtype="float16"),
    "channels": cached("k=int8, v=int8, k_axis=channel, v_axis=channel", heads=(4, 2), width=(64, 32), lengths=(1, 300)),
}


BLOCKS = {
    "balanced": cached("k=int4, v=int4, k_axis=channel, block=16, scales=fp16, v_balance=root", width=(32, 64), lengths=(1, 270)),
    "of any length": cached("k=int2, v=int2, k_axis=channel, block=10, v_balance=root", width=(32, 32), lengths=(2, 75)),
    "int8": cached("k=int8, v=int8, k_axis=channel, block=10, v_balance=root", width=(24, 20), batch=2, tokens=(70, 33)),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", BLOCKS)
def test_tokens_that_were_rounded_a_block_at_a_time(name):
    check(BLOCKS[name], run(BLOCKS[name]))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", WIDER)
def test_wide_rows_of_codes(name):
    """Whole vectors of codes, several blocks and several splits."""
    check(WIDER[name], run(WIDER[name]))


def test_rows_of_several_tiles():
    case = DecodeCase(f"softmax scale(0.25) {LAST} causal", heads=(10, 2), lengths=(5, 300))
    check(case, run(case, tile=DecodeTile(4, 2, 64, min(16, host().vector_bytes // 4))))


def test_odd_widths():
    case = DecodeCase("softmax scale(0.1)", heads=(2, 1), width=(33, 7), lengths=(1, 40))
    check(case, run(case))


def test_a_query_of_zeros_and_one_large_channel():
    """Digits of a query are relative to its largest channel."""
    line = "softmax scale(1.0) cache(k=int8, v=int8)"
    q, k, v = torch.zeros(1, 2, 1, 64), torch.randn(1, 1, 200, 64) * 0.01, torch.randn(1, 1, 200, 64)
    q[0, 1, 0, :3] = torch.tensor([300.0, 1e-3, -1e-30])
    cache = pack_cache(line, k, v)
    right = attend_cache(line, q.double(), cache)
    o, lse = call(line, q, cache, {})
    torch.testing.assert_close(o.double(), right.output, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), right.lse, atol=2e-5, rtol=2e-5)


def test_not_a_number_stays_one():
    line = "softmax cache(k=int8, v=int8)"
    q = torch.randn(1, 2, 1, 64)
    q[0, 1, 0, 5] = torch.nan
    o, _ = call(line, q, pack_cache(line, torch.randn(1, 1, 20, 64), torch.randn(1, 1, 20, 64)), {})
    assert o.isnan().all(-1).flatten().tolist() == [False, True]


def test_what_no_query_sees_is_not_read():
    line = f"softmax scale(0.25) {LAST} causal & (window(9) | global(3))"
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 1000, 16), torch.randn(1, 1, 1000, 16)
    right = attend_cache(line, q.double(), Cache(k.double(), v.double())).output
    k[:, :, 128:800], v[:, :, 128:800] = torch.nan, torch.nan
    torch.testing.assert_close(call(line, q, Cache(k, v), {})[0].double(), right, atol=2e-5, rtol=2e-5)


def test_strides_and_places_in_memory():
    """Heads side by side in a token, tensors that start at any element, operands that are the same for all heads."""
    line = "softmax scale(0.25) add(load(bias, b, h, row, k))"
    q = torch.randn(2 * 4 * 2 * 16 + 1)[1:].view(2, 2, 4, 16).transpose(1, 2)
    k, v = (torch.randn(2 * 150 * 2 * 16 + 3)[3:].view(2, 150, 2, 16).transpose(1, 2) for _ in range(2))
    bias = torch.randn(2, 1, 1, 150).expand(2, 4, 2, 150)
    right = attend_cache(line, q.double(), Cache(k.double(), v.double()), bias=bias.double())
    o, lse = call(line, q, Cache(k, v), {"bias": bias})
    torch.testing.assert_close(o.double(), right.output, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), right.lse, atol=2e-5, rtol=2e-5)


SCRIPT = """
import hashlib, sys, torch
from decode_kernels import call
from attnopt.codegen.tvm.availability import load_runtime
from attnopt.codegen.tvm.threads import follow_torch
from attnopt.ir.kv_cache import pack_cache
torch.manual_seed(0)
line = "softmax scale(0.25) cache(k=int8, v=int4)"
q, k, v = torch.randn(1, 6, 1, 64), torch.randn(1, 3, 3000, 64), torch.randn(1, 3, 3000, 64)
cache = pack_cache(line, k, v)
load_runtime()
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    follow_torch()
    o, lse = call(line, q, cache, {})
    print(hashlib.sha256(o.numpy().tobytes() + lse.numpy().tobytes()).hexdigest())
"""


def test_threads_do_not_change_a_bit():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TVM_NUM_THREADS": "3"}
    made = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert made.returncode == 0, made.stderr
    assert len(made.stdout.split()) == 3
    assert len(set(made.stdout.split())) == 1


@pytest.mark.exhaustive
def test_instructions():
    """Integer products where the machine has them; powers of two without a call."""
    spec, form = parse("softmax cache(k=int8, v=int8)"), DecodeForm(64, 64, "float32")
    wide, narrow = (assembly(emit(spec, form, decode_tile(cpu, 4), cpu), cpu) for cpu in (named("cascadelake"), AVX2))
    assert "vpdpbusd" in wide
    assert "vpdpbusd" not in narrow
    assert "vfmadd" in narrow
    assert "exp2f" not in wide + narrow


def test_arm():
    cpu = named("apple-m1")
    made = assembly(emit(parse("softmax scale(0.125)"), DecodeForm(64, 64, "float16"), decode_tile(cpu, 4), cpu), cpu)
    assert "fmla" in made


def test_a_large_cache_is_asked_for_ahead():
    """A kernel that takes every cache for a large one: the last block is no whole one, and after it there is nothing."""
    case = DecodeCase("softmax scale(0.125)", heads=(4, 2), width=(64, 32), lengths=(1, 600))
    form, tile = DecodeForm(64, 32, "float32", lse=True), decode_tile(host(), 2)
    text = emit(parse(case.spec), form, tile, host())
    assert "llvm.prefetch" in text and "FAR = 50331648" in text
    q, cache, _ = tensors(case)
    o, lse = torch.full((*q.shape[:3], 32), torch.nan), torch.full(q.shape[:3], torch.nan)
    loaded(compile_source(text.replace("FAR = 50331648", "FAR = 0"), host()))(q, cache.k, cache.v, o, lse)
    check(case, (o, lse))
    assert "llvm.prefetch" not in emit(parse(case.spec), form, decode_tile(host(), 1), host())  # one row waits for memory anyhow
