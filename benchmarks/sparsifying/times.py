"""Dense against sparse on a CPU through TVM, at lengths where it counts; choosing included."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import trained_models

import attnopt.operators  # noqa: F401  (registers the operators)
from attnopt.codegen.chosen_pages import by_tvm, run_pages, tables_by_tvm
from attnopt.codegen.sparse import refuses
from attnopt.ir.spec import parse
from attnopt.plan.timing.timing import in_turn
from attnopt.selectors.pages import state_of
from attnopt.selectors.select import select, tiling
from attnopt.selectors.shown import shown_tiles
from sparsifying.corrections import captured

GOAL, LEAST, SKIPPED = 0.4, 8192, 0.35  # of dense time where about 70 % of the tiles are skipped, from this length on
LENGTHS = {8192: 4.0, 16384: 4.0, 32768: 1.0}  # tokens -> seconds of each contender
FORMS = {
    "SpargeAttn, 30 % of the tiles": "causal pooled_blocks(128, 64, share=0.3, similarity=-1.0, first=1)",
    "SpargeAttn, mass 0.9": "causal pooled_blocks(128, 64, mass=0.9, similarity=0.3, first=1)",
    "MoBA, 30 % of the blocks": "causal block_topk({block}, {top})",
    "MoBA, 64 queries choose together": "causal block_topk({block}, {top}, rows=64, first=1)",
    "PowerAttention": "causal & (near_blocks(256, 4) | power_blocks(256) | global(256))",
    "Big Bird, 3 blocks of 256 by chance": "causal & (near_blocks(256, 2) | causal_random_blocks(256, 2, 3, 812) | global(256))",
    "16 sinks and window 1024": "causal & (window(1024) | global(16))",
    "16 sinks and window 1024, delta 64": "causal & (window(1024) | global(16)) delta(64, dense=causal)",
}
PAGE, PAGES = 16, 128  # 2,048 tokens, the budget of the source at 32k
COLUMNS = ["length", "contender", "time", "of dense", "tiles", "choosing"]


@dataclass(frozen=True)
class Time:
    length: int
    contender: str
    seconds: float
    ratio: float
    tiles: float
    choosing: float
    part: str = "times"

    @property
    def key(self) -> tuple[int, str]:
        return (self.length, self.contender)


ROW = Time
PREFILL = ("dense", "dense, torch", *FORMS)
DECODING = (
    "decode, dense",
    f"decode, Quest, {PAGES} pages of {PAGE}",
    f"decode, Quest, {PAGES} pages of {PAGE}, a group together",
)


@torch.no_grad()
def rows(quick: bool, done: Collection[object]) -> Iterator[Time]:
    """Contenders that run in turn are measured together: those of a length, all or none."""
    model, tokens = trained_models.code_lm(), trained_models.code_windows(1, 1024)
    parts = list(captured(model, tokens))[3]  # the fourth attention
    for length, seconds in ({4096: 0.2} if quick else LENGTHS).items():
        left = {names: not {(length, name) for name in names} <= set(done) for names in (PREFILL, DECODING)}
        q, k, v = (x.repeat(1, 1, length // x.shape[2], 1).contiguous() for x in parts)
        if left[PREFILL]:
            yield from at_length(q, k, v, seconds)
        if left[DECODING]:
            yield from decoding(q[:, :, -1:].contiguous(), k, v, seconds / 4)


def decoding(q: Tensor, k: Tensor, v: Tensor, seconds: float) -> Iterator[Time]:
    """One query against a cache: all of it, and the pages that it chooses by a state that is kept."""
    start, length = f"softmax scale({q.shape[3] ** -0.5:.6g})", k.shape[2]
    state = state_of(k, PAGE)
    specs = {
        DECODING[1]: parse(f"{start} pages({PAGE}, {PAGES}, recent=1)"),
        DECODING[2]: parse(f"{start} pages({PAGE}, {PAGES}, recent=1, group=max)"),
    }
    calls = {
        DECODING[0]: lambda: torch.ops.attnopt.tvm_decode(q, k, v, *[None] * 6, [], start),
        **{name: (lambda spec=spec: run_pages(by_tvm, spec, q, k, v, state, tables_by_tvm)) for name, spec in specs.items()},
    }
    for call in calls.values():
        call()
    found = in_turn(calls, seconds=seconds)
    for name, t in found.items():
        choosing = 0.0
        if name in specs:
            clause = specs[name].selection
            assert clause is not None
            choosing = in_turn(
                {"choosing": lambda clause=clause: tables_by_tvm(clause, q, state, state.low.shape[2])}, seconds=0.1
            )["choosing"].median
        share = PAGES * PAGE / length if name in specs else 1.0
        yield Time(length, name, t.median, t.ratio(found[DECODING[0]]), share, choosing)


def at_length(q: Tensor, k: Tensor, v: Tensor, seconds: float) -> Iterator[Time]:
    length, scale = q.shape[2], q.shape[3] ** -0.5
    block = max(64, length // 64)
    start = f"softmax scale({scale:.6g})"
    lines = {
        name: f"{start} {form.format(block=block, top=max(2, round(0.17 * length / block)))}" for name, form in FORMS.items()
    }
    calls = {
        "dense": lambda: torch.ops.attnopt.tvm_attention(q, k, v, [], f"{start} causal"),
        "dense, torch": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True),
        **{name: (lambda line=line: operator(line)(q, k, v, [], line)) for name, line in lines.items()},
    }
    for call in calls.values():  # compiles, and finds the tiles of fixed masks
        call()
    found = in_turn(calls, seconds=seconds, least=3 if length < 32768 else 1)
    for name, t in found.items():
        share, choosing = visited(lines[name], q, k) if name in lines else (1.0, 0.0)
        yield Time(length, name, t.median, t.ratio(found["dense"]), share, choosing)


def operator(line: str) -> Callable[..., Tensor]:
    """That of plain kernels where bounds say all."""
    found: Callable[..., Tensor] = torch.ops.attnopt.tvm_attention if refuses(parse(line)) else torch.ops.attnopt.tvm_sparse
    return found


def visited(line: str, q: Tensor, k: Tensor) -> tuple[float, float]:
    """The share of visible tiles that a form visits, and the seconds that choosing takes."""
    spec = parse(line).with_(correction=None)
    dense = parse("softmax causal").mask
    shown = shown_tiles(spec.with_(mask=dense), q, k, {}, *tiling(spec))
    if spec.selection is None:
        some = shown_tiles(spec, q[:, :1], k[:, :1], {}, *tiling(spec))
        return float(some.sum() / shown.sum()), 0.0
    took = in_turn({"choosing": lambda: select(spec, q, k, {})}, seconds=0.2, least=1)["choosing"].median
    return select(spec, q, k, {}).tiles.share_of(shown), took


def table(found: list[Time]) -> str:
    cells = [
        [
            str(x.length),
            x.contender,
            f"{x.seconds * 1e3:.4g} ms",
            f"{x.ratio:.2f}",
            f"{x.tiles:.0%}",
            f"{x.choosing * 1e3:.3g} ms",
        ]
        for x in found
    ]
    return harness.markdown(COLUMNS, cells)


def goals(found: list[Time]) -> str:
    lines = [
        f"- {x.length}, {x.contender}: {x.tiles:.0%} of the tiles in {x.ratio:.2f} of the time of dense, "
        f"{'at most' if x.ratio <= GOAL else 'NOT at most'} {GOAL}"
        for x in found
        if x.length >= LEAST and ("30 %" in x.contender or (x.tiles <= SKIPPED and x.contender in FORMS))
    ]
    return "\n".join(lines) + "\n"
