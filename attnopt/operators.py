"""Operators of torch whose kernels are made when they first run: what torch must know of them to load a graph, and no more.

    import attnopt; torch.export.load("fast.pt2")   ->   torch.ops.attnopt.triton_attention is known; no compiler is imported

attnopt::triton_attention(q, k, v, operands, spec) computes a spec by the kernel that is emitted for it: on a GPU, or in Triton's
interpreter. On CPU tensors outside of the interpreter it computes the spec's meaning in plain PyTorch, exact and slow, so that a
model that was made for a GPU can be checked, saved and tried where there is none.

attnopt::tvm_attention, tvm_sparse, tvm_pages, tvm_pieces, tvm_blocks and tvm_decode do the same by TVM's kernels on a CPU, and where
TVM is missing by torch's. attnopt::cache_rows rounds tokens and writes them into a cache in codes, by a kernel of TVM's where there is one.
They are declared by their schemas, because a call through `custom_op` takes three times as long, which counts beside a short kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import InputMismatch


@torch.library.custom_op("attnopt::triton_attention", mutates_args=())
def triton_attention(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    """q [B, H, Q, D], k [B, G, K, D], v [B, G', K, E] -> o [B, H, Q, E]; operands in the order of the spec's. Inference only."""
    from attnopt.codegen.triton.triton_attention import read, run_triton

    made: Tensor = run_triton(q, k, v, operands, read(spec))
    return made


@triton_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.custom_op("attnopt::triton_attention_lse", mutates_args=())
def triton_attention_lse(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of each row, float32 [B, H, Q]."""
    from attnopt.codegen.triton.triton_attention import read, run_triton

    o, lse = run_triton(q, k, v, operands, read(spec), lse=True)
    return o, lse


@triton_attention_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("attnopt::triton_sparse", mutates_args=())
def triton_sparse(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    """As triton_attention, where tiles are chosen first, or rows corrected after."""
    from attnopt.codegen.sparse_call import run_checked
    from attnopt.codegen.triton.sparse_attention import run

    return run_checked(run, q, k, v, operands, spec)


@triton_sparse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.custom_op("attnopt::triton_attention_packed", mutates_args=())
def triton_attention_packed(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, operands: list[Tensor], spec: str
) -> Tensor:
    """Sequences one after the other: q [rows, H, D], k [keys, G, D], v [keys, G', E], starts int32 [B + 1] -> o [rows, H, E]."""
    from attnopt.codegen.triton.packed_attention import run_packed
    from attnopt.codegen.triton.triton_attention import read

    made: Tensor = run_packed(q, k, v, q_starts, k_starts, operands, read(spec))
    return made


@triton_attention_packed.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.custom_op("attnopt::triton_attention_packed_lse", mutates_args=())
def triton_attention_packed_lse(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, operands: list[Tensor], spec: str
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of each row, [H, rows]."""
    from attnopt.codegen.triton.packed_attention import run_packed
    from attnopt.codegen.triton.triton_attention import read

    o, lse = run_packed(q, k, v, q_starts, k_starts, operands, read(spec), lse=True)
    return o, lse


@triton_attention_packed_lse.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, operands: list[Tensor], spec: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("attnopt::triton_decode", mutates_args=())
def triton_decode(
    q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, k_zeros: Tensor | None, v_scales: Tensor | None, v_zeros: Tensor | None,
    pages: Tensor | None, lengths: Tensor | None, operands: list[Tensor], spec: str,
) -> Tensor:  # fmt: skip
    """q [B, H, Q, D] against a cache, the parts of which are passed one by one: see `decode_attention`. Inference only."""
    from attnopt.codegen.triton.decode_attention import run_decode
    from attnopt.codegen.triton.triton_attention import read
    from attnopt.ir.kv_cache import Cache

    made: Tensor = run_decode(q, Cache(k, v, k_scales, k_zeros, v_scales, v_zeros, pages, lengths), operands, read(spec))
    return made


@torch.library.custom_op("attnopt::triton_decode_lse", mutates_args=())
def triton_decode_lse(
    q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, k_zeros: Tensor | None, v_scales: Tensor | None, v_zeros: Tensor | None,
    pages: Tensor | None, lengths: Tensor | None, operands: list[Tensor], spec: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and the log-sum-exp of each row."""
    from attnopt.codegen.triton.decode_attention import run_decode
    from attnopt.codegen.triton.triton_attention import read
    from attnopt.ir.kv_cache import Cache

    o, lse = run_decode(q, Cache(k, v, k_scales, k_zeros, v_scales, v_zeros, pages, lengths), operands, read(spec), lse=True)
    return o, lse


def decoded(q: Tensor, v: Tensor, spec: str) -> Tensor:
    """A tensor of the shape that decoding returns: the spec says whether a byte of v holds two channels."""
    from attnopt.codegen.triton.decode_attention import value_width
    from attnopt.codegen.triton.triton_attention import read

    return q.new_empty((*q.shape[:-1], value_width(v, read(spec))))


@triton_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return decoded(q, v, rest[-1])


@triton_decode_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return decoded(q, v, rest[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
SCALES = "Tensor? k_scales, Tensor? k_zeros, Tensor? v_scales, Tensor? v_zeros"
CACHED = f"Tensor q, Tensor k, Tensor v, {SCALES}, Tensor? pages, Tensor? lengths"
PACKED = "Tensor q, Tensor k, Tensor v, Tensor q_starts, Tensor k_starts"
SCHEMAS = {
    "tvm_attention": "(Tensor q, Tensor k, Tensor v, Tensor[] operands, str spec) -> Tensor",
    "tvm_attention_lse": "(Tensor q, Tensor k, Tensor v, Tensor[] operands, str spec) -> (Tensor, Tensor)",
    "tvm_attention_packed": f"({PACKED}, Tensor[] operands, str spec) -> Tensor",
    "tvm_attention_packed_lse": f"({PACKED}, Tensor[] operands, str spec) -> (Tensor, Tensor)",
    "tvm_sparse": "(Tensor q, Tensor k, Tensor v, Tensor[] operands, str spec) -> Tensor",
    "tvm_pages": "(Tensor q, Tensor k, Tensor v, Tensor[] operands, str spec) -> Tensor",
    "tvm_pieces": "(Tensor q, Tensor[] k, Tensor[] v, str spec) -> Tensor",
    "tvm_blocks": "(Tensor q, Tensor[] k, Tensor[] v, str spec) -> Tensor",
    "tvm_decode": f"({CACHED}, Tensor[] operands, str spec) -> Tensor",
    "tvm_decode_lse": f"({CACHED}, Tensor[] operands, str spec) -> (Tensor, Tensor)",
}


def tvm_attention(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str, lse: bool = False) -> Any:
    """As triton_attention, on a CPU."""
    from attnopt.codegen.tvm.tvm_attention import run_tvm

    no_gradients("TVM", spec, q, k, v, *operands)
    return run_tvm(q, k, v, operands, spec, lse)


def tvm_attention_packed(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, operands: list[Tensor], spec: str, lse: bool = False
) -> Any:
    """As triton_attention_packed, on a CPU."""
    from attnopt.codegen.tvm.packed_attention import run_tvm_packed

    no_gradients("TVM", spec, q, k, v, *operands)
    return run_tvm_packed(q, k, v, q_starts, k_starts, operands, spec, lse)


def tvm_sparse(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Any:
    """As tvm_attention, where tiles are chosen first, or rows corrected after."""
    from attnopt.codegen.sparse_call import run_checked
    from attnopt.codegen.tvm.sparse_attention import PARTS, run

    no_gradients("TVM", spec, q, k, v, *operands)
    return run_checked(run, q, k, v, operands, spec, PARTS)


def tvm_pages(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Any:
    """As tvm_attention, of one query that chooses pages of a cache by their bounds."""
    from attnopt.codegen.tvm.page_attention import run_tvm_pages

    no_gradients("TVM", spec, q, k, v, *operands)
    return run_tvm_pages(q, k, v, operands, spec)


def tvm_pieces(q: Tensor, k: list[Tensor], v: list[Tensor], spec: str) -> Any:
    """As tvm_decode, of one query on a cache that holds some of its tokens exactly: codes, scales, zeros, then the exact ones."""
    from attnopt.codegen.tvm.piece_attention import run_tvm_pieces

    no_gradients("TVM", spec, q, *k, *v)
    return run_tvm_pieces(q, k, v, spec)


def tvm_blocks(q: Tensor, k: list[Tensor], v: list[Tensor], spec: str) -> Any:
    """As tvm_pieces, on a cache rounded a block at a time; beside the output stand the weights of the last tokens."""
    from attnopt.codegen.tvm.piece_attention import run_tvm_blocks

    no_gradients("TVM", spec, q, *k, *v)
    return run_tvm_blocks(q, k, v, spec)


def tvm_decode(q: Tensor, k: Tensor, v: Tensor, *rest: Any, lse: bool = False) -> Any:
    """As triton_decode, on a CPU."""
    *parts, operands, spec = rest
    no_gradients("TVM", spec, q, k, v, *operands)
    return tvm_decode_runner()(q, (k, v, *parts), operands, spec, lse)


@functools.cache
def tvm_decode_runner() -> Callable[..., Any]:
    """Imported once: an import at each call costs a tenth of one on a small cache."""
    from attnopt.codegen.tvm.decode_attention import run_parts

    return run_parts


def cache_rows(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, first: int, cache: str, side: str) -> None:
    """x [B, G, n, D] as rows first … first + n of codes [B, G, room, D], scales and zeros, which are written. Raises ValueError."""
    rows_writer()(x, codes, scales, zeros, first, cache, side)


@functools.cache
def rows_writer() -> Callable[..., None]:
    from attnopt.codegen.tvm.cache_rows import write_rows
    from attnopt.ir.packing import Packed

    return lambda x, codes, scales, zeros, *rest: write_rows(x, Packed(codes, scales, zeros), *rest)


def no_gradients(kernels: str, spec: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise InputMismatch(
            f"{kernels} kernels of attnopt have no gradient", where=spec, next_move="Call them under torch.no_grad()."
        )


def fake_attention(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def fake_attention_packed(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, operands: list[Tensor], spec: str
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def fake_decode(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return decoded(q, v, rest[-1])


def fake_pieces(q: Tensor, k: list[Tensor], v: list[Tensor], spec: str) -> Tensor:
    return decoded(q, v[0], spec)


def fake_blocks(q: Tensor, k: list[Tensor], v: list[Tensor], spec: str) -> Tensor:
    return q.new_empty((*q.shape[:3], v[-1].shape[3] + v[-1].shape[2]))


def with_lse(fake: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Of a packed batch the sums are [H, rows]."""
    return lambda q, *rest: (fake(q, *rest), q.new_empty(q.shape[:-1] if q.ndim == 4 else q.shape[1::-1], dtype=torch.float32))


FAMILIES: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "tvm_attention": (tvm_attention, fake_attention),
    "tvm_attention_packed": (tvm_attention_packed, fake_attention_packed),
    "tvm_sparse": (tvm_sparse, fake_attention),
    "tvm_pages": (tvm_pages, fake_attention),
    "tvm_pieces": (tvm_pieces, fake_pieces),
    "tvm_blocks": (tvm_blocks, fake_blocks),
    "tvm_decode": (tvm_decode, fake_decode),
}
for name, schema in SCHEMAS.items():
    run, fake = FAMILIES[name.removesuffix("_lse")]
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, functools.partial(run, lse=True) if name.endswith("_lse") else run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnopt::{name}", with_lse(fake) if name.endswith("_lse") else fake, lib=LIBRARY)


def in_python(target: Any) -> Callable[..., Any] | None:
    """What one of TVM's operators runs, called without torch's dispatcher; None for any other."""
    return RUNS.get(target)


RUNS: dict[Any, Callable[..., Any]] = {
    getattr(torch.ops.attnopt, name).default: FAMILIES[name][0] for name in SCHEMAS if name in FAMILIES
}

LIBRARY.define(
    "cache_rows(Tensor x, Tensor(a!) codes, Tensor(b!) scales, Tensor(c!)? zeros, int first, str cache, str side) -> ()"
)
LIBRARY.impl("cache_rows", cache_rows, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::cache_rows", lambda *given: None, lib=LIBRARY)


def refuse_gradients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """torch calls it where an input asks for a gradient: better now than in a backward pass that is not there."""
    raise InputMismatch(
        "Triton kernels of attnopt have no gradient", where=inputs[-1], next_move="Call them under torch.no_grad()."
    )


OPERATORS = (
    triton_attention, triton_attention_lse, triton_sparse, triton_attention_packed, triton_attention_packed_lse,
    triton_decode, triton_decode_lse,
)  # fmt: skip
for operator in OPERATORS:
    operator.register_autograd(lambda ctx, *gradients: None, setup_context=refuse_gradients)
