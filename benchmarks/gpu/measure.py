"""Measure rows one after the other until the time is up: check the family, time all contenders, compare their results.

measured(cases, deadline)   ->   Row(case, seconds={"flash": …, "attnopt": …}, reasons={"varlen": …}, error=0.004), …
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from gpu.case import Case, Family, cache_bytes, flops, make
from gpu.check import ALLOWED, APART, apart, checked
from gpu.clock import in_turn
from gpu.ours import OURS, kernels
from gpu.peers import GpuLost, finish, first_line, ready

Errors = dict[Family, tuple[float, float | None]]
NOT_REACHED, NOT_MEASURED = "not reached", "not measured"


@dataclass(frozen=True)
class Row:
    """seconds of each contender and why others have none; work: FLOP of a prefill, bytes of a decode; state: empty where it ran.

    error: of the family's kernel against the reference. apart: this row's result against another contender's. cosine: of rounded
    products to exact ones.
    """

    case: Case
    seconds: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    work: float = 0.0
    error: float | None = None
    apart: float | None = None
    state: str = ""
    cosine: float | None = None

    @property
    def wrong(self) -> bool:
        """NaN is wrong too."""
        return not (self.error or 0.0) <= ALLOWED or not (self.apart or 0.0) <= APART


def measured(cases: Sequence[Case], device: torch.device, deadline: float, seed: int | None = None) -> Iterator[Row]:
    """Rows in order; the last one's length is taken for the next one's, so that a row is not begun that cannot be ended.

    Data are fresh in each run unless `seed` is given.
    """
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    errors: Errors = {}
    longest, lost = 0.0, ""
    for case in cases:
        started = time.monotonic()
        if lost or started + longest > deadline:
            yield Row(case, state=lost or NOT_REACHED)
            continue
        row, lost = guarded(case, device, generator, errors)
        yield row
        longest = max(0.8 * longest, time.monotonic() - started)


def guarded(case: Case, device: torch.device, generator: torch.Generator, errors: Errors) -> tuple[Row, str]:
    """A row whatever happens, and why none can follow, if so."""
    try:
        try:
            return one(case, device, generator, errors), ""
        except torch.OutOfMemoryError:
            return Row(case, state="out of memory"), ""
        except GpuLost:
            raise
        except Exception as failure:  # of a row: the others must go on, unless the GPU does not
            finish()
            return Row(case, state=f"failed: {first_line(failure)}"), ""
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
    except GpuLost as failure:
        return Row(case, state=f"the GPU stopped: {failure}"), f"{NOT_REACHED}: the GPU stopped"


def one(case: Case, device: torch.device, generator: torch.Generator, errors: Errors) -> Row:
    reasons: dict[str, str] = {}
    if case.family not in errors:
        try:
            errors[case.family] = checked(case, device, generator)
        except Exception as failure:  # said in the row: the peers are measured without us
            reasons["check"] = first_line(failure)
            finish()
    data = make(case, device, generator)
    calls, refused = ready(case, data)
    work = flops(case, data) if case.kind == "prefill" else cache_bytes(data)
    peer = next((name for name in calls if name not in kernels(case)), None)
    difference = apart(calls[OURS](), calls[peer]()) if peer and OURS in calls else None
    seconds = in_turn(calls) if calls else {}
    error, cosine = errors.get(case.family, (None, None))
    return Row(case, seconds, {**reasons, **refused}, work, error, difference, cosine=cosine)
