"""Write tokens into a cache in codes: what stands behind the operator attnopt::cache_rows, and its kernel, kernels/cache_rows.py.

    write_rows(k [B, G, n, D], Packed(codes [B, G, room, D], scales, zeros), 7, "cache(k=int8, v=int8)", "k")
        ->   rows 7 … 7 + n of codes, scales and zeros are those of `pack`

A token that is generated is rounded alone, and torch needs twenty operations for it on each side of each layer: more time than attention
takes to read thousands of tokens. Torch does what the kernel has not: other numbers than float32, fp8, scales in bf16 or over tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.codegen.specialise import Slot, specialise
from attnopt.codegen.template import joined
from attnopt.codegen.tvm.availability import missing, say_once
from attnopt.codegen.tvm.cpu import Cpu, host
from attnopt.codegen.tvm.kernel_cache import compiled
from attnopt.codegen.tvm.prefill import IMPORTS
from attnopt.codegen.tvm.threads import follow_torch
from attnopt.codegen.tvm.tvm_attention import runnable
from attnopt.ir.clause import Clause
from attnopt.ir.expr import Const
from attnopt.ir.packing import MIDDLE, PER_BYTE, Packed, pack
from attnopt.ir.signatures import BITS
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec, parse
from attnopt.ir.storage import FLOATS, largest_code

PARTS = ("decode_lanes", "cache_rows")
READ = ("int8", "int4", "int2")


@dataclass(frozen=True)
class RowsForm:
    """How rows of `width` channels are stored; keys and values that are stored alike share a kernel. scales: their dtype."""

    width: int
    storage: str
    group: int
    symmetric: bool
    clip: float
    scales: str


@dataclass(frozen=True)
class RowsTile:
    """There is one way to do it."""


def write_rows(x: Tensor, into: Packed, first: int, cache: str, side: str) -> None:
    """x [B, G, n, D] as rows first … first + n of a cache that has room for them.

    cache: the clause, in words. Raises ValueError for numbers that are not finite, and for rows that `pack` does not take.
    """
    clause = read(cache)
    if x.dtype is torch.float32 and x.device.type == "cpu" and x.stride(3) == 1:
        run = kernel(form_of(cache, side, x.shape[3]))
        if not isinstance(run, Refusal):
            bad = torch.zeros(1, dtype=torch.int32)
            follow_torch()
            run(x, *(part for part in (into.codes, into.scales, into.zeros) if part is not None), bad, first)
            if not bad.item():
                return
    new, count = pack(x, clause, side), x.shape[2]
    for part, rows in ((into.codes, new.codes), (into.scales, new.scales), (into.zeros, new.zeros)):
        if part is not None and rows is not None:
            part[:, :, first : first + count] = rows


@functools.lru_cache(maxsize=64)
def read(cache: str) -> Clause:
    clause = parse(f"softmax {cache}").cache
    assert clause is not None
    return clause


@functools.lru_cache(maxsize=256)
def form_of(cache: str, side: str, width: int) -> RowsForm | Refusal:
    clause = read(cache)
    storage, group, clip = clause.word(side), clause.count("group") or width, clause.expr("clip")
    assert isinstance(clip, Const)
    if storage not in READ:
        return Refusal(f"{storage} rows are written by torch", clause)
    if clause.word(f"{side}_axis") == "channel":
        return Refusal("a scale over tokens waits for all of them", clause)
    if clause.word("scales") == "bf16":
        return Refusal("TVM does not round to bf16 as torch does", clause)
    if width % group or width % PER_BYTE.get(storage, 1):
        return Refusal(f"rows of {width} channels are no whole groups of {group}, or no whole bytes", clause)
    scales = str(FLOATS[clause.word("scales")]).removeprefix("torch.")
    return RowsForm(width, storage, group, clause.word("levels") == "symmetric", float(clip.value), scales)


@functools.lru_cache(maxsize=64)
def kernel(form: RowsForm | Refusal) -> Callable[..., None] | Refusal:
    if isinstance(form, Refusal):
        return form
    if (reason := missing()) is not None:
        say_once(reason)
        return Refusal(reason)
    return runnable(compiled("cache-rows", AttentionSpec(), form, RowsTile(), host(), lambda: emit(form, host())))


def emit(form: RowsForm, cpu: Cpu) -> str:
    """The source of a file with the kernel."""
    per_byte, top, bits = PER_BYTE.get(form.storage, 1), largest_code(form.storage), BITS[form.storage]
    decided = {
        "D": form.width, "STORED": form.width // per_byte, "GROUP": form.group, "GROUPS": form.width // form.group,
        "PER_BYTE": per_byte, "BITS": bits, "TOP": top, "MOST": 2 * top if form.symmetric else 2.0**bits - 1, "CLIP": form.clip,
        "MIDDLE": 0.0 if per_byte > 1 else top if form.symmetric else float(MIDDLE[form.storage]),
        "LARGEST": torch.finfo(getattr(torch, form.scales)).max, "SYMMETRIC": form.symmetric,
        "CODE_DTYPE": "uint8" if per_byte > 1 else "int8", "SCALE_DTYPE": form.scales,
    }  # fmt: skip
    slots = [Slot("zeros", () if form.symmetric else ("zeros: T.handle",), ("zeros",))]
    text = specialise(joined("attnopt.codegen.tvm", PARTS, IMPORTS), decided, {}, slots, keep="attention")
    head = (
        f"Rows of {form.width} channels to {form.storage}, groups of {form.group} share a scale in {form.scales}, on {cpu.name}."
    )
    return f'"""{head}"""\n\n{text}'
