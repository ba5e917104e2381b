"""Run a spec by the kernel that is emitted for it: what stands behind the operator attnopt::triton_attention.

    run_triton(q, k, v, [slopes], parse("softmax scale(0.1) add(alibi) causal"))   ->   o [B, H, Q, E]

Triton is imported when a kernel first runs. Under its interpreter (TRITON_INTERPRET=1, set before Triton is imported) kernels run
on CPU tensors, bfloat16 as float32, because the interpreter's products of bfloat16 are wrong. Without the interpreter CPU tensors
take the reference, in float32 where they are halves, as the kernels add.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.emitted import load
from attnopt.codegen.triton.availability import interpreted, missing
from attnopt.codegen.triton.configurations import configurations
from attnopt.codegen.triton.low_precision import INTERPRETER, fitted, refused_by
from attnopt.codegen.triton.prefill import Form, emit, supports
from attnopt.codegen.triton.tiles import ARCHITECTURES, INTERPRETED
from attnopt.errors import InputMismatch
from attnopt.ir.reference import attend, check_shapes
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec, parse

RENAMED = {"sm_103": "sm_100"}  # compiled alike: the table of the nearest architecture holds


def run_triton(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], spec: AttentionSpec, lse: bool = False) -> Any:
    """q [B, H, Q, D], k [B, G, K, D], v [B, G', K, E] -> o [B, H, Q, E], with lse also the log-sum-exp float32 [B, H, Q].

    tensors in the order of `spec.operands`. Raises InputMismatch for inputs that do not fit the spec, stand on a GPU without Triton
    or without kernels for it, or ask for what the family refuses.
    """
    check_shapes(spec, q, k, v)
    on_cpu = q.device.type == "cpu" and not interpreted()
    if (reason := missing()) is not None and not on_cpu:
        raise InputMismatch(reason, where=str(spec), next_move="pip install triton, or choose another kernel.")
    if k.shape[2] == 0:
        raise InputMismatch("there are no keys", where=f"k {list(k.shape)}", next_move="Give at least one.")
    emulated = interpreted() and q.dtype == torch.bfloat16
    given = (q.float(), k.float(), v.float()) if emulated else (q, k, v)
    operands = dict(zip(operands_of(spec), tensors, strict=True))
    form = form_of(given[0], v.shape[3], operands, lse)
    if (refused := refusal(spec, form)) is not None:
        raise InputMismatch(str(refused), where=str(spec), next_move="Another kernel may compute it: attnopt.attention(…).")
    if on_cpu:
        return run_reference(q, k, v, operands, spec, lse)
    module = kernel(spec, form, architecture(q.device))
    with torch.cuda.device_of(q):  # Triton launches on the current GPU
        made = module.attention(*given, *tensors)
    return made if not emulated else (made[0].to(q.dtype), made[1]) if lse else made.to(q.dtype)


def run_reference(q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Tensor], spec: AttentionSpec, lse: bool) -> Any:
    """What the kernel computes, by the meaning of the spec: the whole score matrix is in memory."""
    made = attend(spec, q.float(), k.float(), v.float(), **operands)
    output = made.output.to(q.dtype).contiguous()
    return (output, made.lse) if lse else output


def form_of(q: Tensor, value_width: int, operands: Mapping[str, Tensor], lse: bool) -> Form:
    dtypes = tuple((name, str(x.dtype).removeprefix("torch.")) for name, x in operands.items())
    return Form(q.shape[-1], value_width, str(q.dtype).removeprefix("torch."), dtypes, lse)


def architecture(device: torch.device) -> str:
    """The name of the device's architecture in the table of tiles."""
    if interpreted():
        return "interpreted"
    if device.type != "cuda":
        raise InputMismatch(f"Triton kernels run on a GPU, not on '{device}'", next_move="Move the tensors with .cuda().")
    name = named(device)
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputMismatch(f"no kernels for '{name}'", where=str(device), next_move=f"There are for {known}.")
    return name


def named(device: torch.device) -> str:
    """sm_90, gfx942: what the architecture of a GPU is called; empty for what is no GPU."""
    if device.type != "cuda":
        return ""
    about = torch.cuda.get_device_properties(device)
    name = about.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{about.major}{about.minor}"
    return RENAMED.get(name, name)


@functools.lru_cache(maxsize=256)
def kernel(spec: AttentionSpec, form: Form, name: str) -> Any:
    """The module that was emitted for a spec on an architecture: with the first tile that the compiler accepts without spills, or
    the last of the table where it accepts none."""
    if name == "interpreted":
        tile = next(iter(fitted([INTERPRETED], spec)))
        return load(emit(spec, form, tile, INTERPRETER))
    from attnopt.codegen.triton.kernel_cache import compiled

    if (refused := refused_by(name, spec)) is not None:
        raise InputMismatch(refused.reason, where=str(spec), next_move="Write p=fp16, v=fp16, or use another GPU.")
    best = compiled(spec, form, name)
    if isinstance(best, Refusal):
        last = configurations(spec, form, name)[-1]
        return load(emit(spec, form, last, ARCHITECTURES[name].backend))
    return load(best.source)


@functools.lru_cache(maxsize=256)
def read(spec: str) -> AttentionSpec:
    return parse(spec)


# What depends on the spec alone is asked once: to walk its expressions takes longer than a short kernel runs.
@functools.lru_cache(maxsize=256)
def operands_of(spec: AttentionSpec) -> tuple[str, ...]:
    return spec.operands


@functools.lru_cache(maxsize=256)
def refusal(spec: AttentionSpec, form: Form) -> Refusal | None:
    return supports(spec, form)
