"""Run a spec by the kernel that is emitted for it: what stands behind the operator attnopt::tvm_attention.

    run_tvm(q, k, v, [slopes], "softmax scale(0.1) add(alibi) causal")   ->   o [B, H, Q, E]

The kernel is compiled when a spec first runs, or found on disk. Tensors are passed as they are, in any strides; one whose channels do
not stand side by side is copied. What depends on the spec, on dtypes and on shapes alone is asked once: a call takes microseconds.
Where TVM is missing or fails, torch's own kernels compute the spec, and one line says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm.availability import missing, say_once
from attnopt.codegen.tvm.compile import Compiled, loaded
from attnopt.codegen.tvm.cpu import host
from attnopt.codegen.tvm.kernel_cache import compiled
from attnopt.codegen.tvm.operand_shapes import check_operands
from attnopt.codegen.tvm.prefill import emit, supports
from attnopt.codegen.tvm.threads import follow_torch
from attnopt.codegen.tvm.tiles import MANY, Tile
from attnopt.codegen.tvm.tuning import chosen_tile
from attnopt.errors import InputMismatch
from attnopt.ir.reference import attend, check_shapes
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec, parse
from attnopt.runtime.attention import attention

ELSEWHERE = "Another kernel may compute it: attnopt.attention(…)."


@dataclass(frozen=True)
class Ready:
    """A spec with its kernel, or why there is none and torch's kernels take over."""

    spec: AttentionSpec
    kernel: Callable[..., None] | Refusal


def run_tvm(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], spec: str, lse: bool = False) -> Any:
    """q [B, H, Q, D], k [B, G, K, D], v [B, G', K, E] -> o [B, H, Q, E], with lse also the log-sum-exp float32 [B, H, Q].

    tensors in the order of the spec's operands. Raises InputMismatch for inputs that do not fit the spec, are not on a CPU, or ask for
    what the family refuses. Inference only.
    """
    check(spec, q.shape, k.shape, v.shape, q.device.type, tuple(x.shape for x in tensors))
    found = ready(spec, q.dtype, q.shape[3], v.shape[3], tuple(x.dtype for x in tensors), lse, min(q.shape[2], MANY))
    if isinstance(found.kernel, Refusal):
        return by_library(q, k, v, tensors, found.spec, lse)
    o = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype)
    outputs = (o, torch.empty(q.shape[:3], dtype=torch.float32)) if lse else (o,)
    if o.numel():
        call(found.kernel, (rows(q), rows(k), rows(v), *tensors, *outputs), spec)
    return outputs if lse else o


def call(kernel: Callable[..., None], arguments: Sequence[Tensor], spec: str) -> None:
    """Run a kernel, which checks ranks, dtypes and widths itself."""
    follow_torch()
    try:
        kernel(*arguments)
    except (TypeError, ValueError) as mismatch:
        lines = [line.strip() for line in str(mismatch).splitlines() if line.strip()]
        raise InputMismatch("; ".join(lines), where=spec, next_move="Give tensors as the spec's operands are.") from None


def rows(x: Tensor) -> Tensor:
    """x with channels side by side; a copy only where they are not."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=1024)
def check(spec: str, q: torch.Size, k: torch.Size, v: torch.Size, device: str, operands: tuple[torch.Size, ...]) -> None:
    """Raises InputMismatch where the shapes do not fit; those that fit are remembered."""
    if device != "cpu":
        raise InputMismatch(
            f"TVM's kernels run on a CPU, not on '{device}'", where=spec, next_move="Move the tensors with .cpu()."
        )
    parsed = read(spec)
    check_shapes(parsed, *(torch.empty(shape, device="meta") for shape in (q, k, v)))
    if k[2] == 0:
        raise InputMismatch("there are no keys", where=f"k {list(k)}", next_move="Give at least one.")
    if len(operands) != len(parsed.operands):
        said = f"{len(operands)} operands were given, and the spec has {len(parsed.operands)}"
        raise InputMismatch(said, where=spec, next_move=f"Give {', '.join(parsed.operands) or 'none'}, in this order.")
    if parsed.selection is None or parsed.selection.name == "blocks":  # else it is refused
        check_operands(parsed, q[0], q[1], q[2], k[2], dict(zip(parsed.operands, operands, strict=True)))


@functools.lru_cache(maxsize=1024)
def ready(
    spec: str, dtype: torch.dtype, width: int, value_width: int, dtypes: tuple[torch.dtype, ...], lse: bool, queries: int = MANY
) -> Ready:
    """queries: up to MANY, so many or more."""
    parsed = read(spec)
    named = tuple((name, typed(x)) for name, x in zip(parsed.operands, dtypes, strict=True))
    form = Form(width, value_width, typed(dtype), named, lse)
    if (refused := supports(parsed, form)) is not None:
        raise InputMismatch(str(refused), where=spec, next_move=ELSEWHERE)
    if (reason := missing()) is not None:
        say_once(reason)
        return Ready(parsed, Refusal(reason))
    return Ready(parsed, kernel(parsed, form, chosen_tile(parsed, form, host(), queries)))


@functools.lru_cache(maxsize=256)
def kernel(spec: AttentionSpec, form: Form, tile: Tile) -> Callable[..., None] | Refusal:
    """The compiled kernel of a spec on this machine."""
    return runnable(compiled("prefill", spec, form, tile, host(), lambda: emit(spec, form, tile, host())))


def runnable(made: Compiled | Refusal) -> Callable[..., None] | Refusal:
    """What was compiled as a function; a refusal where the system does not load it."""
    if isinstance(made, Compiled):
        try:
            return loaded(made)
        except (OSError, RuntimeError) as failure:
            made = Refusal(f"a compiled kernel cannot be loaded: {str(failure).strip().splitlines()[0]}")
    say_once(f"torch's kernels take over: {made.reason}")
    return made


def by_library(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], spec: AttentionSpec, lse: bool) -> Any:
    """The same by torch."""
    operands = dict(zip(spec.operands, tensors, strict=True))
    if not lse:
        return attention(q, k, v, spec, **operands).contiguous()
    made = attend(spec, q.float(), k.float(), v.float(), **operands)
    return made.output.to(q.dtype).contiguous(), made.lse


def typed(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=256)
def read(spec: str) -> AttentionSpec:
    return parse(spec)
