"""Kernels run on as many threads as torch does, and never on more than the machine or its user allows."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from small_kernel import SOURCE

from attnopt.codegen.tvm import threads
from attnopt.codegen.tvm.compile import compile_source, loaded
from attnopt.codegen.tvm.cpu import host
from attnopt.codegen.tvm.threads import follow_torch

pytest.importorskip("tvm", reason="TVM is not installed")

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
AFTERWARDS = """
import os, torch, tvm_ffi
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.threads import follow_torch
missing()
before = os.sched_getaffinity(0)
follow_torch()
print(tvm_ffi.get_global_func("runtime.NumThreads")(), os.sched_getaffinity(0) == before)
"""


@pytest.fixture(autouse=True)
def restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def kernel():
    return loaded(compile_source(SOURCE, host()))


def working() -> int:
    import tvm_ffi

    return int(tvm_ffi.get_global_func("runtime.NumThreads")())


def test_torch_decides():
    for wanted in (1, 2, 1, 64):
        torch.set_num_threads(wanted)
        follow_torch()
        assert working() == min(wanted, CORES)


def test_each_thread_has_its_own(kernel):
    torch.set_num_threads(2)
    found = []

    def run():
        follow_torch()
        q, o = torch.randn(1, 2, 64, 16), torch.full((1, 2, 64, 16), torch.nan)
        kernel(q, q, q, o)
        found.append((working(), bool(o.isfinite().all())))

    others = [threading.Thread(target=run) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert found == [(min(torch.get_num_threads(), CORES), True)] * 3


def test_the_user_may_allow_fewer(monkeypatch):
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    assert threads.capacity() == 1
    monkeypatch.setenv("TVM_NUM_THREADS", "1000")
    assert threads.capacity() == CORES
    monkeypatch.setenv("TVM_NUM_THREADS", "")
    assert threads.capacity() == CORES


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not say")
@pytest.mark.parametrize("limit", ["", "1"])
def test_the_caller_is_not_tied_to_a_core(limit):
    environment = {**os.environ, "TVM_NUM_THREADS": limit, "OMP_NUM_THREADS": "2"}
    told = subprocess.run([sys.executable, "-c", AFTERWARDS], env=environment, capture_output=True, text=True, check=False)
    assert told.stdout.split() == ["1" if limit else str(min(2, CORES)), "True"], told.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_child_runs_on_one_thread(kernel):
    torch.set_num_threads(2)
    follow_torch()
    q, o = torch.randn(1, 2, 64, 16), torch.full((1, 2, 64, 16), torch.nan)
    kernel(q, q, q, o)
    answer = multiprocessing.get_context("fork").SimpleQueue()

    def child():
        follow_torch()
        again = torch.full((1, 2, 64, 16), torch.nan)
        kernel(q, q, q, again)
        answer.put((working(), (again.numpy() == o.numpy()).all()))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert answer.get() == (1, True)
