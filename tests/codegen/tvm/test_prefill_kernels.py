"""The family for many queries on the case table: each case is computed as `reference` does, and whatever the number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from prefill_cases import TABLE, exact, tensors, tolerance
from prefill_kernels import attention

from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.cpu import host, named
from attnopt.ir.reference import reference
from attnopt.plan.timing.timing import in_turn

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    case = TABLE[name]
    (q, k, v), rest = tensors(case)
    o, log_sum = attention(case.spec, q, k, v, lse=True, **rest)
    torch.testing.assert_close(o.double(), exact(case), atol=tolerance(case), rtol=tolerance(case))
    assert not log_sum.isnan().any()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["causal", "window_or_global", "rest_not_whole", "half_bias"])
def test_vectors_of_eight(name):
    """As AVX2 has them: what a kernel for an older machine computes here."""
    if not set(named("haswell").features) <= set(host().features):
        pytest.skip("this machine has no AVX2")
    case = TABLE[name]
    (q, k, v), rest = tensors(case)
    o, _ = attention(case.spec, q, k, v, cpu="haswell", **rest)
    torch.testing.assert_close(o.double(), exact(case), atol=tolerance(case), rtol=tolerance(case))


def test_log_sum_exp():
    q, k, v = (torch.randn(1, 2, length, 16) for length in (70, 131, 131))
    _, log_sum = attention("softmax scale(0.25)", q, k, v, lse=True)
    torch.testing.assert_close(log_sum, (q.double() @ k.double().mT * 0.25).logsumexp(-1).float(), atol=1e-5, rtol=1e-5)


def test_any_strides_and_places_in_memory():
    """Heads inside of rows, rows that start at odd addresses, a bias that repeats."""
    rows = torch.randn(2, 75, 3, 3, 17)
    q, k, v = (rows[:, :, i, :, 1:].transpose(1, 2) for i in range(3))
    bias = torch.randn(75)[None, None, None].expand(2, 3, 75, 75)
    line = "softmax scale(0.25) add(load(bias, b, h, row, k)) causal"
    o, _ = attention(line, q, k, v, bias=bias)
    want = reference(line, q.double(), k.double(), v.double(), bias=bias.double())
    torch.testing.assert_close(o.double(), want, atol=2e-5, rtol=2e-5)


def test_what_is_outside_of_the_range_is_not_read():
    q, k, v = (torch.randn(1, 1, 400, 16) for _ in range(3))
    line = "softmax scale(0.25) causal & window(40)"
    want, _ = attention(line, q, k, v)
    k[:, :, :100] = v[:, :, :100] = float("nan")
    o, _ = attention(line, q, k, v)
    first = 100 + 64 + 39  # no query of a block of up to 64 sees what stands before
    assert torch.equal(o[:, :, first:], want[:, :, first:])
    assert o[:, :, :100].isnan().all()


def test_nan_stays_visible():
    q, k, v = (torch.randn(1, 1, 20, 16) for _ in range(3))
    q[0, 0, 3, 2] = float("nan")
    o, _ = attention("softmax scale(0.25)", q, k, v)
    assert o[0, 0, 3].isnan().all() and not o[0, 0, [0, 1, 2, 4]].isnan().any()


@pytest.mark.parametrize("factor", [1e4, 1e18])
def test_extreme_scores(factor):
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    o, _ = attention("softmax scale(0.25)", q * factor, k, v)
    best = v.gather(2, (q @ k.mT).argmax(-1)[..., None].expand(-1, -1, -1, 16))
    torch.testing.assert_close(o, best, atol=1e-3, rtol=1e-3)


def test_a_sharp_attention_takes_no_longer_than_another():
    """Weights that are next to nothing are nothing: sums of numbers of few bits took five times as long."""
    q, k, v = (torch.randn(1, 2, 512, 16) for _ in range(3))
    calls = {name: partial(attention, "softmax scale(0.25)", q * factor, k, v) for name, factor in (("flat", 1), ("sharp", 30))}
    times = in_turn(calls, seconds=0.1, clock=time.process_time)
    assert times["sharp"].ratio(times["flat"]) < 2.0
    o, _ = calls["sharp"]()
    want = reference("softmax scale(0.25)", q.double() * 30, k.double(), v.double())
    torch.testing.assert_close(o.double(), want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("lengths", [(0, 5), (3, 0)])
def test_no_queries_or_no_keys(lengths):
    q, k, v = torch.randn(1, 1, lengths[0], 16), *(torch.randn(1, 1, lengths[1], 16) for _ in range(2))
    o, _ = attention("softmax scale(0.25) causal", q, k, v)
    assert o.shape == (1, 1, lengths[0], 16)


THREADS = """
import hashlib, torch
from prefill_kernels import attention
torch.manual_seed(0)
q, k, v = (torch.randn(2, 3, 190, 16) for _ in range(3))
o, _ = attention("softmax scale(0.25) causal & window(70)", q, k, v)
print(hashlib.sha256(o.numpy().tobytes()).hexdigest())
"""


@pytest.mark.exhaustive
def test_the_number_of_threads_changes_no_bit():
    said = set()
    for threads in ("1", "3"):
        env = {
            **os.environ,
            "TVM_NUM_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            "PYTHONPATH": os.pathsep.join(["tests", *sys.path]),
        }
        said.add(subprocess.run([sys.executable, "-c", THREADS], env=env, capture_output=True, text=True, check=True).stdout)
    assert len(said) == 1
