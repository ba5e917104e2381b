"""The rates of the machine that this runs on: matrix products by type, bandwidth by working set, the price of a call.

    rated(cpu)   ->   cpu with peak, levels, bandwidth and launch          a fraction of a second, once for each process

`attnopt calibrate` keeps what is measured here in a file, and measures the kernels besides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from attnopt.cost.target import Target

FIRST = ("float32", "int8")  # what is measured of a machine that nobody has calibrated: layers of both are always candidates
SIDES = (256, 384, 512, 768)  # of square matrices: large enough for the peak, short enough to run undisturbed
TYPES = ("float32", "bfloat16", "float16", "int8")
SLOW = 0.05  # a type that is slower than this share of float32 has no kernel of its own here: its rate would mislead
SIZES = tuple(2**n for n in (18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28))  # working sets: 256 KB to 256 MB
Progress = Callable[[str], None]
RATED: dict[str, Target] = {}


def rated(target: Target) -> Target:
    """The target with rates: its own where it has them, else those of this machine, measured in a moment and once."""
    if target.peak:
        return target
    if target.name not in RATED:
        RATED[target.name] = with_rates(target, seconds=0.1, types=FIRST, sizes=SIZES[::3])
    return RATED[target.name]


def with_rates(
    target: Target,
    *,
    seconds: float,
    types: tuple[str, ...] = TYPES,
    sizes: tuple[int, ...] = SIZES,
    said: Progress = lambda line: None,
) -> Target:
    """The target with what is measured here, about `seconds` for each number."""
    peak: dict[str, float] = {}
    for dtype in types:
        said(f"products of {dtype}")
        rate = product_rate(dtype, seconds)
        if rate is not None and rate / 1e12 > SLOW * peak.get("float32", 0.0):
            peak[dtype] = rate / 1e12
    levels = []
    for size in sizes:
        said(f"bandwidth of {size / 2**20:g} MB")
        levels.append((float(size), bandwidth(size, seconds)))
    said("a call")
    levels = list(falling(levels))
    return replace(
        target, peak=peak, levels=tuple(levels), bandwidth=levels[-1][1], cache_bandwidth=levels[0][1], launch=call(seconds)
    )


def falling(levels: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Larger sets are never faster: what a noisy moment took from a small one is given back."""
    for i, (size, _) in enumerate(levels):
        yield size, max(rate for _, rate in levels[i:])


def clock() -> Callable[[], float]:
    """What seconds are counted by: on one thread those of this process alone, so that what others do is not counted."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def least_seconds(run: Callable[[], object], seconds: float) -> float:
    """The quickest of repeated runs: what disturbs a machine only ever adds."""
    now = clock()
    run()
    best, until = float("inf"), now() + seconds
    while True:
        started = now()
        run()
        ended = now()
        if ended > started:  # a virtual machine's clock may stand still for a run
            best = min(best, ended - started)
        if ended > until and best < float("inf"):
            return best


def product_rate(dtype: str, seconds: float) -> float | None:
    """Operations a second of square products, the best of several sizes; None where torch has none of this type here."""
    generator = torch.Generator().manual_seed(0)
    return max(
        (rate for side in SIDES if (rate := square(dtype, side, generator, seconds / len(SIDES))) is not None), default=None
    )


def square(dtype: str, side: int, generator: torch.Generator, seconds: float) -> float | None:
    a = torch.randn(side, side, generator=generator)
    try:
        if dtype == "int8":
            whole = a.clamp(-2, 2).mul(50).to(torch.int8)
            return 2.0 * side**3 / least_seconds(lambda: torch._int_mm(whole, whole), seconds)
        typed = a.to(getattr(torch, dtype))
        return 2.0 * side**3 / least_seconds(lambda: typed @ typed, seconds)
    except (RuntimeError, AttributeError):
        return None


def bandwidth(size: int, seconds: float) -> float:
    """Bytes a second of a working set that is gone through again and again: the better of copying half of it and reading it all."""
    held = torch.ones(size // 4)
    half = held.numel() // 2
    copied = least_seconds(lambda: held[half:].copy_(held[:half]), seconds / 2)
    read = least_seconds(lambda: torch.dot(held[half:], held[:half]), seconds / 2)
    return size / min(copied, read)


def call(seconds: float) -> float:
    """Seconds of a call that has nothing to do."""
    a, out = torch.ones(8), torch.ones(8)
    return least_seconds(lambda: torch.add(a, a, out=out), seconds)
