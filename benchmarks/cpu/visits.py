"""Whether time follows the blocks that a mask, documents or a list of blocks leave: one head on one long text.

follow(8192, seconds)   ->   Visit("window 512", share=0.07, seconds=0.011, rate=1.04), …      rate: seconds for a visited pair / the median

A pair counts where its block of 64 x 64 holds a pair that is seen.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.cost.machine import clock
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.spec import parse
from attnopt.plan.timing.timing import in_turn

BLOCK = 64  # rows and keys of the blocks that are counted
WIDTH = 64
WINDOWS = (32, 8, 2)  # the text is so many windows long
DOCUMENTS = (32, 4)  # or holds so many documents
SHARES = (0.1, 0.3)  # of the blocks that a list keeps
DENSE = ("full", "causal")
LIMIT = (
    "visits: a block of 64 queries reads its queries and writes its output however few keys it sees, which shows where a query "
    "sees 256 keys and fewer. Tried on what a block costs beside its products, 7 us: queries and outputs turned in registers (2.7 "
    "us less; window 256 in 0.95 and 32 documents in 0.92 of the time), what a piece of keys has in common read once for it: both "
    "kept; prefetching of queries (1 to 4 %): not kept"
)


@dataclass(frozen=True)
class Setting:
    """A spec with its operands; seen: bool [blocks of queries, blocks of keys], which are visited."""

    name: str
    spec: str
    operands: Mapping[str, Tensor]
    seen: Tensor


@dataclass(frozen=True)
class Visit:
    """share: of all pairs that is visited. rate: seconds for a visited pair over the median of the settings."""

    name: str
    share: float
    seconds: float
    rate: float


def settings(length: int) -> list[Setting]:
    places = torch.arange(length)
    lines: list[tuple[str, str, dict[str, Tensor]]] = [("full", "", {}), ("causal", "causal", {})]
    lines += [(f"window {length // n}", f"causal & window({length // n})", {}) for n in WINDOWS]
    lines += [(f"{n} documents", "causal & document", {"document": (places // (length // n))[None]}) for n in DOCUMENTS]
    found = [Setting(name, mask, operands, seen(mask, length, operands)) for name, mask, operands in lines]
    lower = seen("causal", length, {})
    generator = torch.Generator().manual_seed(0)
    for share in SHARES:
        tiles = (torch.rand(lower.shape, generator=generator) < share) | torch.eye(len(lower), dtype=torch.bool)
        line = f"causal blocks({BLOCK}, {BLOCK}, operand=list)"
        found.append(Setting(f"list of {share:.0%}", line, {"list": tiles[None, None]}, tiles & lower))
    return found


def seen(mask: str, length: int, operands: Mapping[str, Tensor]) -> Tensor:
    """Which blocks hold a visible pair."""
    blocks = length // BLOCK
    if not mask:
        return torch.ones(blocks, blocks, dtype=torch.bool)
    shown = evaluate(parse(f"softmax {mask}").mask, Grid(1, 1, length, length), operands).expand(1, 1, length, length)
    return shown.view(blocks, BLOCK, blocks, BLOCK).any(3).any(1)


def follow(length: int, seconds: float) -> list[Visit]:
    q, k, v = torch.randn(3, 1, 1, length, WIDTH, generator=torch.Generator().manual_seed(0))
    found = settings(length)

    def call(setting: Setting) -> object:
        line = f"softmax scale({WIDTH**-0.5}) {setting.spec}"
        return torch.ops.attnopt.tvm_attention(q, k, v, [setting.operands[x] for x in parse(line).operands], line)

    calls = {setting.name: (lambda setting=setting: call(setting)) for setting in found}
    for run in calls.values():  # compiled before the clock runs
        run()
    spent = {name: x.median for name, x in in_turn(calls, seconds=seconds, clock=clock()).items()}
    rates = {x.name: spent[x.name] / float(x.seen.sum()) for x in found}
    middle = statistics.median(rates.values())
    return [Visit(x.name, float(x.seen.float().mean()), spent[x.name], rates[x.name] / middle) for x in found]
