"""attnopt's kernels as contenders: the operators that optimised models call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import attnopt.operators  # noqa: F401  (registers them)
from attnopt.ir.spec import parse
from gpu.case import Case, Data


def ours(case: Case, data: Data) -> Callable[[], Tensor]:
    spec, operands = case.spec, [data.operands[name] for name in parse(case.spec).operands]
    if case.kind == "decode":
        parts = tuple(vars(data.cache).values())
        return lambda: torch.ops.attnopt.triton_decode(data.q, *parts, operands, spec)
    return lambda: torch.ops.attnopt.triton_attention(data.q, data.k, data.v, operands, spec)
