"""Compile the kernels of all rows before the first is measured, on every core: what one process after the other would take minutes for.

compile_ahead(rows(), "sm_90")   ->   attnopt's cache of compiled kernels holds them; a process that fails leaves its kernels out
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch

from attnopt.codegen.triton import decode_attention, triton_attention
from attnopt.ir.spec import parse
from gpu.case import Case, Family, make
from gpu.ours import in_pieces

META = torch.device("meta")


def families(cases: Sequence[Case]) -> list[Case]:
    """One case of each, the first: kernels do not depend on lengths and batch."""
    found: dict[Family, Case] = {}
    for case in cases:
        found.setdefault(case.family, case)
    return list(found.values())


def compile_one(case: Case, architecture: str) -> None:
    """What the operators do when they first run, for tensors that hold nothing."""
    data = make(case, META, None)
    spec = parse(case.spec)
    if case.kind == "decode":
        form = decode_attention.form_of(data.q, data.cache, {}, data.q.dtype, False, spec)
        decode_attention.kernel(spec, form, architecture, decode_attention.rows_of(data.q, data.cache))
        return
    operands = {name: data.operands[name] for name in spec.operands}
    form = triton_attention.form_of(data.q, data.v.shape[3], operands, False)
    triton_attention.kernel(spec, form, architecture)
    if case.mask == "documents":
        triton_attention.kernel(parse(in_pieces(case)), replace(form, operands=(), packed=True), architecture)


def compile_ahead(cases: Sequence[Case], architecture: str) -> str:
    """Empty, or why some kernels are not there; they are compiled when their row is reached."""
    context = multiprocessing.get_context("spawn")  # a fork of a process that uses a GPU cannot use it
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), mp_context=context) as pool:
        waiting = [pool.submit(compile_one, case, architecture) for case in families(cases)]
        failures = [str(f.exception()) for f in waiting if f.exception() is not None]
    return f"{len(failures)} of {len(waiting)} kernels were not compiled ahead: {failures[0]}" if failures else ""
