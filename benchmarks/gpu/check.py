"""Is a kernel right? Fresh random data, lengths that divide no tile, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnopt.ir.kv_cache import attend_cache
from gpu.case import Case, make
from gpu.ours import kernels

ALLOWED = 2e-2  # largest |a - b| of bf16 results of size one
APART = 4e-2  # largest |a - b| / largest |b| between two kernels in bf16
LENGTH = 333


def error(case: Case, device: torch.device, generator: torch.Generator) -> float:
    """Largest difference of the case's kernel from the reference, at a length of its own and two rows of a batch."""
    trial = replace(case, q_len=min(case.q_len, LENGTH), kv_len=min(case.kv_len, LENGTH), batch=2, window=min(case.window, 100))
    data = make(trial, device, generator)
    wanted = attend_cache(trial.spec, data.q.double(), data.cache, **data.operands).output
    gaps = [(prepare(trial, data)().double() - wanted).abs().max() for prepare in kernels(trial).values()]
    return float(torch.stack(gaps).max())  # NaN if one is


def apart(found: Tensor, other: Tensor) -> float:
    """How far two results of a timed row are from each other, relative to the largest value; without a copy in float64."""
    return float((found.float() - other.float()).abs().max() / other.float().abs().max())
