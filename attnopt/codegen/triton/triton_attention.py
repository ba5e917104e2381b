"""attnopt::triton_attention: a spec run by the kernel that is emitted for it, as one operator that export can save.

    triton_attention(q, k, v, [slopes], "softmax scale(0.1) add(alibi) causal")   ->   o [B, H, Q, E]

Triton is imported when the operator first runs. Under its interpreter (TRITON_INTERPRET=1, set before Triton is imported) it runs
on CPU tensors, bfloat16 as float32, because the interpreter's products of bfloat16 are wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.triton.availability import interpreted, missing
from attnopt.codegen.triton.emitted import load
from attnopt.codegen.triton.prefill import Form, emit, supports
from attnopt.codegen.triton.tiles import ARCHITECTURES, INTERPRETED, Tile, tiles
from attnopt.errors import InputMismatch
from attnopt.ir.reference import check_shapes
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec, parse

RENAMED = {"sm_103": "sm_100"}  # compiled alike: the table of the nearest architecture holds


def run_triton(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], spec: AttentionSpec, lse: bool = False) -> Any:
    """q [B, H, Q, D], k [B, G, K, D], v [B, G', K, E] -> o [B, H, Q, E], with lse also the log-sum-exp float32 [B, H, Q].

    tensors in the order of `spec.operands`. Raises InputMismatch for inputs that do not fit the spec, stand on a machine without
    Triton kernels, or ask for what the family refuses.
    """
    check_shapes(spec, q, k, v)
    if (reason := missing()) is not None:
        raise InputMismatch(reason, where=str(spec), next_move="pip install triton, or choose another kernel.")
    if k.shape[2] == 0:
        raise InputMismatch("there are no keys", where=f"k {list(k.shape)}", next_move="Give at least one.")
    emulated = interpreted() and q.dtype == torch.bfloat16
    given = (q.float(), k.float(), v.float()) if emulated else (q, k, v)
    form = form_of(given[0], v.shape[3], dict(zip(spec.operands, tensors, strict=True)), lse)
    if (refused := supports(spec, form)) is not None:
        raise InputMismatch(str(refused), where=str(spec), next_move="Another kernel may compute it: attnopt.attention(…).")
    made = kernel(spec, form, architecture(q.device)).attention(*given, *tensors)
    return made if not emulated else (made[0].to(q.dtype), made[1]) if lse else made.to(q.dtype)


def form_of(q: Tensor, value_width: int, operands: Mapping[str, Tensor], lse: bool) -> Form:
    dtypes = tuple((name, str(x.dtype).removeprefix("torch.")) for name, x in operands.items())
    return Form(q.shape[-1], value_width, str(q.dtype).removeprefix("torch."), dtypes, lse)


def architecture(device: torch.device) -> str:
    """The name of the device's architecture in the table of tiles."""
    if interpreted():
        return "interpreted"
    if device.type != "cuda":
        raise InputMismatch(f"Triton kernels run on a GPU, not on '{device}'", next_move="Move the tensors with .cuda().")
    about = torch.cuda.get_device_properties(device)
    name = about.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{about.major}{about.minor}"
    name = RENAMED.get(name, name)
    if name not in ARCHITECTURES:
        raise InputMismatch(f"no kernels for '{name}'", where=about.name, next_move=f"There are for {', '.join(ARCHITECTURES)}.")
    return name


@functools.lru_cache(maxsize=256)
def kernel(spec: AttentionSpec, form: Form, name: str) -> Any:
    """The module that was emitted for a spec on an architecture."""
    if name == "interpreted":
        return load(emit(spec, form, INTERPRETED))
    return load(emit(spec, form, fitting(spec, form, name), ARCHITECTURES[name].backend))


def fitting(spec: AttentionSpec, form: Form, name: str) -> Tile:
    """The first tile that the compiler accepts without spills; the last of the table where none is."""
    from attnopt.codegen.triton.compile import compile_best

    best = compile_best(spec, form, name)
    return tiles(name, form.width, form.value_width, form.dtype)[-1] if isinstance(best, Refusal) else best.tile


@functools.lru_cache(maxsize=256)
def read(spec: str) -> AttentionSpec:
    return parse(spec)


def refuse_gradients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """torch calls it where an input asks for a gradient: better now than in a backward pass that is not there."""
    raise InputMismatch(
        "Triton kernels of attnopt have no gradient", where=inputs[-1], next_move="Call them under torch.no_grad()."
    )


@torch.library.custom_op("attnopt::triton_attention", mutates_args=())
def triton_attention(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    """See `run_triton`. Inference only."""
    made: Tensor = run_triton(q, k, v, operands, read(spec))
    return made


@triton_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.custom_op("attnopt::triton_attention_lse", mutates_args=())
def triton_attention_lse(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of each row."""
    o, lse = run_triton(q, k, v, operands, read(spec), lse=True)
    return o, lse


@triton_attention_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


for operator in (triton_attention, triton_attention_lse):
    operator.register_autograd(lambda ctx, *gradients: None, setup_context=refuse_gradients)
