"""Is a kernel right? Fresh random data, lengths that divide no tile, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnopt.ir.kv_cache import attend_cache
from attnopt.ir.reference import reference
from gpu.case import ROUNDED, Case, make
from gpu.ours import OURS, kernels

ALLOWED = 2e-2  # largest |a - b| / max(1, |b|): a step of bf16 grows with the number
APART = 4e-2  # largest |a - b| / largest |b| between two kernels in bf16
LENGTH = 333
# Of all numbers: where products are rounded, one that lies between two codes may become either. Two codes of fp8 are 6 to 12 % apart, so
# that one weight may move a whole row that sees few keys, and the first rows of a causal mask are nearly one in a hundred here.
NEAR = {"int8 fp16": 0.999, "int8 fp8": 0.99}


def checked(case: Case, device: torch.device, generator: torch.Generator) -> tuple[float, float | None]:
    """Largest difference of the case's kernel from the reference, at a length of its own and two rows of a batch.

    Where products are rounded, the difference that its share NEAR of the numbers keep, and the cosine of the result to the exact one.
    """
    trial = replace(case, q_len=min(case.q_len, LENGTH), kv_len=min(case.kv_len, LENGTH), batch=2, window=min(case.window, 100))
    data = make(trial, device, generator)
    if trial.rounded:
        q, k, v = (x.double() for x in (data.q, data.k, data.v))
        got = kernels(trial)[OURS](trial, data)().double()
        gaps = gap(got, reference(trial.spec, q, k, v, **data.operands)).flatten()
        exact = reference(trial.spec.removesuffix(ROUNDED[trial.rounded]), q, k, v, **data.operands)
        alike = torch.nn.functional.cosine_similarity(got.flatten(), exact.flatten(), dim=0)
        return float(gaps.quantile(NEAR[trial.rounded])), float(alike)
    wanted = attend_cache(trial.spec, data.q.double(), data.cache, **data.operands).output
    gaps = [gap(prepare(trial, data)().double(), wanted).max() for prepare in kernels(trial).values()]
    return float(torch.stack(gaps).max()), None  # NaN if one is


def gap(found: Tensor, wanted: Tensor) -> Tensor:
    """Absolute below one, relative above."""
    return (found - wanted).abs() / wanted.abs().clamp(min=1.0)


def apart(found: Tensor, other: Tensor) -> float:
    """How far two results of a timed row are from each other, relative to the largest value; without a copy in float64."""
    return float((found.float() - other.float()).abs().max() / other.float().abs().max())
