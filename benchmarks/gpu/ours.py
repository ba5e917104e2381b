"""attnopt's kernels as contenders: the operators that optimised models call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import attnopt.operators  # noqa: F401  (registers them)
from attnopt.ir.spec import parse
from gpu.case import Case, Data
from gpu.sdpa import NotSaid


def ours(case: Case, data: Data) -> Callable[[], Tensor]:
    if case.kind == "decode":
        raise NotSaid("attnopt has no kernel for decoding yet")
    operands = [data.operands[name] for name in parse(case.spec).operands]
    return lambda: torch.ops.attnopt.triton_attention(data.q, data.k, data.v, operands, case.spec)
