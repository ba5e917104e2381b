"""How many threads a kernel runs on: as many as torch, and never more than TVM_NUM_THREADS where it is set.

    torch.set_num_threads(2); follow_torch()   ->   kernels that this thread calls run on 2

What holds, from TVM's own runtime (thread_pool.cc and threading_backend.cc of apache-tvm 0.27):

- Each Python thread that calls a kernel has a pool of its own, made at its first call and never larger afterwards. It is made as large
  as this process may be; how many of its threads work is set before a call where torch's number has changed. Idle ones sleep.
- With one thread a kernel runs in the thread that calls it.
- TVM ties its threads, and the thread that calls, to the first cores: torch's threads, started later, would all share one. That is
  turned off, unless TVM_BIND_THREADS is set.
- A thread that has finished waits for the next task for 300,000 rounds before it sleeps, and takes time from torch's threads
  meanwhile; here it is a hundredth of that, unless TVM_THREAD_POOL_SPIN_COUNT is set.
- After a fork the threads of a pool are gone, and a call would wait for them for ever: a child runs on one thread.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

LIMIT, BIND, SPIN = "TVM_NUM_THREADS", "TVM_BIND_THREADS", "TVM_THREAD_POOL_SPIN_COUNT"
ROUNDS = "3000"
SHARED = -3  # TVM's mode in which threads take any of the cores that are named, and as many may run as are named


class Pool(threading.local):
    """working: threads that this Python thread's kernels run on; 0 where it has no pool yet."""

    working = 0
    forked = False


POOL = Pool()


def follow_torch() -> None:
    """Call it before a kernel. It costs a tenth of a microsecond where nothing has changed."""
    wanted = torch.get_num_threads()
    if wanted != POOL.working:
        configure(wanted)


def configure(wanted: int) -> None:
    most = capacity()
    if POOL.forked:
        number = 1
    elif POOL.working == 0:
        os.environ.setdefault(BIND, "0")
        os.environ.setdefault(SPIN, ROUNDS)
        pooled()(SHARED, most, names(most))  # makes the pool
        number = min(wanted, most)
    else:
        number = min(wanted, most)
    pooled()(SHARED, number, names(number))
    POOL.working = wanted


def capacity() -> int:
    """The most threads that kernels may ever run on here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get(LIMIT, "")
    return max(1, min(cores, int(given))) if given.isdigit() else cores


@functools.cache
def pooled() -> Callable[..., Any]:
    import tvm_ffi

    found: Callable[..., Any] = tvm_ffi.get_global_func("runtime.config_threadpool")
    return found


@functools.cache
def names(count: int) -> list[str]:
    """TVM counts them, and would tie threads to them if it were let."""
    return [str(core) for core in range(count)]


def after_fork() -> None:
    POOL.forked, POOL.working = POOL.forked or POOL.working > 0, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)
