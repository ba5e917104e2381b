"""One decoding step as a graph, whose cache comes and goes: all keys against the pages that `quest` lets it read, in torch and in ONNX.

What runs is what a user gets: the pass's nodes, page bounds in and out beside the keys, and the kernel that the planner would take.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import harness
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import trained_models

from attnopt.cost.target import load_target
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Host
from attnopt.passes import Quest
from attnopt.patterns import recognise
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import Move
from attnopt.plan.options.workshop import Workshop
from attnopt.plan.timing.timing import in_turn
from sparsifying.corrections import captured

TRACED = 48  # keys of the past that the graph is traced with
TOKENS = 1024  # that a query reads
COLUMNS = ["length", "runtime", "contender", "time", "of dense"]
CONTENDERS = ("dense", f"Quest, {TOKENS} tokens", f"Quest, {TOKENS} tokens together")
# Where nothing is measured: candidates are asked for, and none is chosen by what it loses.
UNWEIGHED = SimpleNamespace(mean=1.0, worst=1.0, kept=0.0, bound=0.0)
EVIDENCE = SimpleNamespace(left_out=lambda site, name, forms: [UNWEIGHED] * len(forms(site)))


@dataclass(frozen=True)
class Timed:
    length: int
    runtime: str
    contender: str
    seconds: float
    ratio: float
    part: str = "steps"

    @property
    def key(self) -> tuple[int, str, str]:
        return (self.length, self.runtime, self.contender)


ROW = Timed


class Step(nn.Module):
    """The new rows side by side [B, 1, (H + 2 G) D], (past keys, past values [B, G, P, D])   ->   o, (keys, values)."""

    def __init__(self, heads: int, groups: int, width: int) -> None:
        super().__init__()
        self.width = width
        sizes, eye = [n * width for n in (heads, groups, groups)], torch.eye((heads + 2 * groups) * width)
        self.q, self.k, self.v = (nn.Linear(len(eye), size, bias=False) for size in sizes)
        self.o = nn.Linear(sizes[0], len(eye), bias=False)
        with torch.no_grad():
            for layer, rows in zip((self.q, self.k, self.v), eye.split(sizes), strict=True):
                layer.weight.copy_(rows)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (f(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        made = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + self.o(made.transpose(1, 2).flatten(2)), (k, v)


@torch.no_grad()
def rows(quick: bool, done: Collection[object]) -> Iterator[Timed]:
    lengths = {4096: 0.2} if quick else {8192: 3.0, 32768: 3.0}
    left = [n for n in lengths if not {(n, r, c) for r in ("torch", "onnxruntime") for c in CONTENDERS} <= set(done)]
    if not left:
        return
    q, k, v = list(captured(trained_models.code_lm(), trained_models.code_windows(1, 1024)))[3]
    x = torch.cat([part[:, :, -1:].flatten(1)[:, None] for part in (q, k, v)], -1)
    example = (x, (k[:, :, :TRACED].contiguous(), v[:, :, :TRACED].contiguous()))
    host = FxHost.from_captured(capture(Step(q.shape[1], k.shape[1], q.shape[3]).eval(), example))
    for runtime, each in (("torch", host), ("onnxruntime", OnnxHost.from_model(host.to_onnx()))):
        hosts = {"dense": each, **by_pages(each, runtime)}
        for length in left:
            past = (part.repeat(1, 1, length // part.shape[2], 1).contiguous() for part in (k, v))
            inputs = dict(zip([s.name for s in each.input_specs], (x, *past), strict=True))
            calls = {name: call(made, made.adapt(inputs)) for name, made in hosts.items()}
            found = in_turn(calls, seconds=lengths[length])
            for name, t in found.items():
                if (length, runtime, name) not in done:
                    yield Timed(length, runtime, name, t.median, t.ratio(found["dense"]))


def call(host: Host, inputs: dict[str, Tensor]) -> Callable[[], object]:
    run = host.runner()
    return lambda: run(inputs)


def by_pages(host: Host, runtime: str) -> dict[str, Host]:
    """By contender, the host after the pass."""
    group, rewrite = Grouping(host, recognise(host.graph).sites).whole()[0], Quest(budgets=(TOKENS,), dense=0)
    shop = Workshop(host, {}, load_target("cpu")[0], runtime, 0, host.graph.sizes(host.example_inputs()))
    found = rewrite.propose(group, EVIDENCE)
    assert isinstance(found, list), found
    return {f"Quest, {c.kind}": shop.built([Move(rewrite, group, c)]) for c in found}


def table(found: list[Timed]) -> str:
    cells = [[str(x.length), x.runtime, x.contender, f"{x.seconds * 1e3:.3g} ms", f"{x.ratio:.2f}"] for x in found]
    return harness.markdown(COLUMNS, cells)


def goals(found: list[Timed]) -> str:
    slower = [f"{x.length}, {x.runtime}, {x.contender}" for x in found if x.ratio > 1]
    return (
        f"- {'; '.join(slower)}: NOT faster than all keys\n" if slower else "- every step by pages is faster than by all keys\n"
    )
