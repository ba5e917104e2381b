"""Time calls in turn on a GPU: the cache is emptied before each, and the queue is kept full, so that launching costs nothing.

    in_turn({"flash": f, "attnopt": g}, seconds=0.5)   ->   {"flash": 0.00412, "attnopt": 0.00398}        medians, f g f g f g …

Before each call the GPU writes over its last-level cache and then waits a moment, during which Python gets the call and the event
after it into the queue. Without a GPU (the interpreter) the clock of the processor is read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

WAIT = 600_000  # cycles, about a third of a millisecond
FEWEST, MOST = 5, 30  # rounds


@cache
def flushed() -> Tensor:
    """Four times the size of the last-level cache."""
    size = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 << 20
    return torch.empty(4 * size, dtype=torch.int8, device="cuda")


def once(call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed().zero_()
    torch.cuda._sleep(WAIT)
    start.record()
    call()
    end.record()
    return start, end


def one_round(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of one run of each."""
    if not torch.cuda.is_available():
        return {name: on_cpu(call) for name, call in calls.items()}
    events = {name: once(call) for name, call in calls.items()}
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}


def on_cpu(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_turn(calls: Mapping[str, Callable[[], object]], seconds: float = 0.4) -> dict[str, float]:
    """The median of each, in about `seconds` altogether. The calls have run before, so that nothing compiles here."""
    started = time.perf_counter()
    first = one_round(calls)
    if not torch.cuda.is_available():
        return first
    spent = time.perf_counter() - started
    rounds = [one_round(calls) for _ in range(min(MOST, max(FEWEST, int(seconds / spent))))]
    return {name: statistics.median(r[name] for r in rounds) for name in calls}
