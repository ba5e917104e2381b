"""One query on the pages of a cache that it chooses: what stands behind the operator attnopt::tvm_pages.

    run_tvm_pages(q [B, H, 1, D], k [B, G, K, D], v [B, G, K, E], [low, high], "softmax causal pages(16, 64, recent=1, low=l, high=h) …")
        ->   o [B, H, 1, E]

One kernel chooses by the bounds of the pages, another reads what was chosen where it lies. Where TVM is missing torch does both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.codegen.chosen_pages import paged, refuses, run_pages, tables_by_tvm
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.tvm import decode
from attnopt.codegen.tvm.decode_attention import kernel
from attnopt.codegen.tvm.tvm_attention import ELSEWHERE, call, typed
from attnopt.errors import InputMismatch
from attnopt.ir.at_end import at_end
from attnopt.ir.clause import Clause
from attnopt.ir.kv_cache import Cache, attend_cache
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec, parse
from attnopt.selectors.pages import PageState


@dataclass(frozen=True)
class Read:
    """A spec, where its bounds stand among its operands, and what is computed of the pages: found once, a hash of a spec takes as long as
    the choice of pages."""

    spec: AttentionSpec
    low: int
    high: int
    paged: AttentionSpec

    @property
    def clause(self) -> Clause:
        assert self.spec.selection is not None
        return self.spec.selection


def supports(spec: AttentionSpec, form: Form | None = None) -> Refusal | None:
    """None where the kernels compute the spec, whose state comes as operands."""
    if (refused := refuses(spec)) is not None:
        return refused
    clause = spec.selection
    assert clause is not None
    if None in (clause.operand("low"), clause.operand("high")) or len(spec.operands) != 2:
        return Refusal("the bounds of the pages are no operands", clause)
    if not clause.count("recent"):
        return Refusal("the newest page, which may be short, is not always read", clause)
    if not at_end(spec):
        return Refusal("the query is not said to be that of the newest key", spec)
    return None if form is None else decode.supports(paged(spec), paged_form(form))


def paged_form(form: Form) -> DecodeForm:
    """Of the kernel that reads pages: bounds are no operands of it."""
    return DecodeForm(form.width, form.value_width, form.dtype, lengths=True)


def run_tvm_pages(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], spec: str) -> Tensor:
    """o [B, H, 1, E]; tensors: the smallest and largest channels [B, G, P, D] of all pages, in the order of the spec's operands.

    Raises InputMismatch for inputs that do not fit the spec, and for a spec that these kernels do not compute. Inference only.
    """
    found = read(spec)
    if len(tensors) != 2:
        raise InputMismatch(f"{len(tensors)} operands were given", where=spec, next_move="Give the bounds of the pages.")
    low, high = tensors[found.low], tensors[found.high]
    check(spec, q.shape, k.shape, v.shape, low.shape, high.shape)
    state = PageState(low, high, k.shape[2])
    rows = q.shape[1] // k.shape[1] if found.clause.word("group") != "none" else 1
    run = reader(spec, Form(q.shape[3], v.shape[3], typed(q.dtype)), rows)
    if isinstance(run, Refusal):
        return run_pages(by_reference, found.spec, q, k, v, state)
    return run_pages(run, found.spec, q, k, v, state, tables_by_tvm, within=True, read=found.paged)


@functools.lru_cache(maxsize=256)
def reader(spec: str, form: Form, rows: int) -> Callable[[AttentionSpec, Tensor, Cache], Tensor] | Refusal:
    """The kernel that reads pages, for so many rows that share them, by its strides: other lengths of a cache are no other kernel."""
    found = read(spec)
    if (refused := supports(found.spec, form)) is not None:
        raise InputMismatch(str(refused), where=spec, next_move=ELSEWHERE)
    run = kernel(found.paged, paged_form(form), rows)
    if isinstance(run, Refusal):
        return run

    def attend(_: AttentionSpec, q: Tensor, cache: Cache) -> Tensor:
        o = q.new_empty((*q.shape[:3], cache.v.shape[3]))
        assert cache.pages is not None and cache.lengths is not None
        call(run, (q, cache.k, cache.v, cache.pages, cache.lengths, o), spec)
        return o

    return attend


def by_reference(spec: AttentionSpec, q: Tensor, cache: Cache) -> Tensor:
    return attend_cache(spec, q.float(), cache).output.to(q.dtype)


@functools.lru_cache(maxsize=256)
def read(spec: str) -> Read:
    parsed = parse(spec)
    if (refused := supports(parsed)) is not None:
        raise InputMismatch(str(refused), where=spec, next_move=ELSEWHERE)
    assert parsed.selection is not None
    low, high = (parsed.operands.index(str(parsed.selection.operand(side))) for side in ("low", "high"))
    return Read(parsed, low, high, paged(parsed))


def check(spec: str, q: torch.Size, k: torch.Size, v: torch.Size, low: torch.Size, high: torch.Size) -> None:
    """Shapes change with each step: numbers are compared before anything is remembered or made."""
    found = read(spec)
    count = -(-k[2] // found.clause.count(0))
    wanted = (*k[:2], count, k[3])
    if len(q) != 4 or q[2] != 1 or not low == high == wanted:
        raise InputMismatch(
            f"q {list(q)}, k {list(k)} and bounds {list(low)}, {list(high)}",
            where=spec,
            next_move=f"Give one query, and bounds {list(wanted)}.",
        )
