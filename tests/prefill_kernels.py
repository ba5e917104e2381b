"""Kernels of TVM's family for many queries, compiled once for each spec and form, and called on outputs that are NaN before.

attention("softmax scale(0.25) causal", q, k, v)   ->   o, and the log-sum-exp where it is asked for
"""

from __future__ import annotations

from functools import lru_cache

import torch

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm.compile import compile_source, loaded
from attnopt.codegen.tvm.cpu import host, named
from attnopt.codegen.tvm.prefill import emit, supports
from attnopt.codegen.tvm.tiles import fitting, tiles
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse


@lru_cache
def kernel(line, width=64, value_width=64, dtype="float32", operands=(), lse=False, cpu=None):
    spec, form, machine = parse(line), Form(width, value_width, dtype, operands, lse), host() if cpu is None else named(cpu)
    assert supports(spec, form) is None
    made = compile_source(emit(spec, form, fitting(tiles(machine, form), spec)[0], machine), machine)
    assert not isinstance(made, Refusal), made.reason
    return loaded(made)


def attention(line, q, k, v, lse=False, cpu=None, **operands):
    """The output and the log-sum-exp; both are NaN before the kernel runs."""
    spec = parse(line)
    given = [operands[name] for name in spec.operands]
    types = tuple((name, str(operands[name].dtype).removeprefix("torch.")) for name in spec.operands)
    run = kernel(line, q.shape[3], v.shape[3], str(q.dtype).removeprefix("torch."), types, lse, cpu)
    o = torch.full((*q.shape[:3], v.shape[3]), float("nan"), dtype=q.dtype)
    log_sum = torch.full(q.shape[:3], float("nan"))
    run(q, k, v, *given, o, *[log_sum] * lse)
    return o, log_sum
