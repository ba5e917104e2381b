"""Choose pages by a kernel: kernels/page_choice.py for one width and one way to choose, compiled when it is first asked for.

    choose_pages(pages(16, 128, recent=1), q [B, H, 1, D], state, room)   ->   pages int32 [tables, n], lengths int32 [tables]

A call takes some ten microseconds, where torch takes as many operations, and copies the state where heads share keys. What the kernel
has not (rows that are not float32, many heads to a key head) is None: torch chooses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.codegen.specialise import specialise
from attnopt.codegen.template import joined
from attnopt.codegen.tvm.availability import missing, say_once
from attnopt.codegen.tvm.cpu import Cpu, host
from attnopt.codegen.tvm.kernel_cache import compiled
from attnopt.codegen.tvm.prefill import IMPORTS
from attnopt.codegen.tvm.threads import follow_torch
from attnopt.codegen.tvm.tvm_attention import runnable
from attnopt.ir.clause import Clause
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec, parse
from attnopt.selectors.pages import PageState

PARTS = ("decode_lanes", "page_choice")
MOST_HEADS = 8  # that share keys: each has a register for its sum


@dataclass(frozen=True)
class ChoiceForm:
    """width: channels of a query. heads: query heads to a key head."""

    width: int
    heads: int


@dataclass(frozen=True)
class ChoiceTile:
    lanes: int


def choose_pages(clause: Clause, q: Tensor, state: PageState, room: int) -> tuple[Tensor, Tensor] | None:
    """Tables of the first rows of the pages for q [B, H, 1, D], in the order of heads; room: rows of the cache of a key head."""
    batch, heads, _, width = q.shape
    groups, count = state.low.shape[1:3]
    fits = all(x.dtype == torch.float32 and x.stride(-1) == 1 and x.device.type == "cpu" for x in (q, state.low, state.high))
    if not fits or heads // groups > MOST_HEADS or not count:
        return None
    run = kernel(clause.word("group"), clause.count(0), clause.count("recent"), ChoiceForm(width, heads // groups))
    if isinstance(run, Refusal):
        return None
    tables = batch * (heads if clause.word("group") == "none" else groups)
    pages = torch.empty(tables, min(clause.count(1), count), dtype=torch.int32)
    lengths = torch.empty(tables, dtype=torch.int32)
    follow_torch()
    run(q, state.low, state.high, torch.tensor([state.length, room], dtype=torch.int32), pages, lengths)
    return pages, lengths


@functools.lru_cache(maxsize=64)
def kernel(group: str, page: int, recent: int, form: ChoiceForm) -> Callable[..., None] | Refusal:
    if (reason := missing()) is not None:
        say_once(reason)
        return Refusal(reason)
    spec, tile = parse(f"softmax pages({page}, 1, recent={recent}, group={group})"), ChoiceTile(host().vector_bytes // 4)
    return runnable(compiled("pages", spec, form, tile, host(), lambda: emit(spec, form, host())))


def emit(spec: AttentionSpec, form: ChoiceForm, cpu: Cpu) -> str:
    """The source of a file with the kernel. spec: `pages(…)`, of which the number to choose is read at run time."""
    clause, lanes = spec.selection, cpu.vector_bytes // 4
    assert clause is not None
    way = clause.word("group")
    decided = {
        "D": form.width, "D_LANES": min(lanes, form.width & -form.width), "LANES": lanes, "HEADS": form.heads,
        "TABLES": form.heads if way == "none" else 1, "APART": way == "none", "MEAN": way == "mean", "PAGE": clause.count(0),
        "RECENT": clause.count("recent"),
    }  # fmt: skip
    text = specialise(joined("attnopt.codegen.tvm", PARTS, IMPORTS), decided, {}, [], keep="attention")
    return f'"""Pages of {clause.count(0)} keys that a query of {form.width} channels reads, group={way}."""\n\n{text}'
