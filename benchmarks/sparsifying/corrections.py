"""Delta correction beside sinks and a window, and beside the narrowest window that takes as long: on real activations.

errors of   sinks + window   |   with delta(64)   |   sinks + a wider window, at the time of the corrected one
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import trained_models
from recall_task import recall_batch

import attnopt.operators  # noqa: F401  (registers the operators)
from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.analysis.operands import held, tapped
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.site import Site
from attnopt.patterns import recognise
from attnopt.plan.timing.timing import Timing, in_turn
from sparsifying.losses import Logits, error

GAMMA, TAIL = 64, 128  # every so many rows are dense, and so many last ones
WIDER = (1.5, 2, 3, 4, 6, 8, 12, 16)  # times the window
COLUMNS = [
    "model",
    "length",
    "sinks",
    "window",
    "error",
    "time",
    "error with delta",
    "time",
    "window at equal time",
    "its error",
    "time",
]
Rows = tuple[Tensor, Tensor, Tensor]  # q [B, H, Q, D], k and v [B, G, K, D] of one attention


@dataclass(frozen=True)
class Corrected:
    """Errors: relative, means over attentions. Times: seconds of all attentions of the model on one sample."""

    model: str
    length: int
    sinks: int
    window: int
    error: float
    seconds: float
    delta_error: float
    delta_seconds: float
    equal_window: int
    equal_error: float
    equal_seconds: float
    part: str = "corrections"

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.model, self.length, self.window)


ROW = Corrected


def subjects(quick: bool) -> Iterator[tuple[str, int, tuple[tuple[int, int], ...], Callable[[], tuple[nn.Module, Tensor]]]]:
    """Name, length, (sinks, window) to correct, and the model with one sample."""
    for length in (512,) if quick else (1024, 4096):
        windows = ((4, 64),) if quick else ((4, 64), (16, 256))
        yield "code-lm", length, windows, lambda n=length: (trained_models.code_lm(), trained_models.code_windows(1, n))
    for length in (512,) if quick else (1024, 1900):
        yield "recall", length, windows, lambda n=length: (trained_models.recall_model(), recall_batch(1, 32, n, 0).tokens)


@torch.no_grad()
def rows(quick: bool, done: Collection[object]) -> Iterator[Corrected]:
    for name, length, windows, make in subjects(quick):
        left = [(sinks, window) for sinks, window in windows if (name, length, window) not in done]
        attentions = list(captured(*make())) if left else []
        for sinks, window in left:
            yield measured(name, length, sinks, window, attentions, seconds=0.2 if quick else 4.0)


def captured(model: nn.Module, tokens: Tensor) -> Iterator[Rows]:
    """The rows of every attention, of one head for each that keys have."""
    inputs = {"input_ids": tokens}
    host = FxHost.from_captured(capture(Logits(model).eval(), inputs))
    sites = recognise(host.graph).sites
    evidence = Evidence(host, Calibration.of(host.graph, [inputs]), sites=sites)
    for site in sites:
        _, data = next(iter(evidence.hold(tapped(site))))
        on = held(site, dict(zip(tapped(site), data, strict=True)), host.graph.sizes(inputs))
        yield on.q.contiguous(), *(x[:, :: x.shape[1] // groups(site, on.q)].contiguous() for x in (on.k, on.v))


def groups(site: Site, q: Tensor) -> int:
    heads = site.spec.head_counts
    return q.shape[1] if heads is None else heads[1]


def measured(name: str, length: int, sinks: int, window: int, attentions: Sequence[Rows], seconds: float) -> Corrected:
    start = f"softmax scale({attentions[0][0].shape[3] ** -0.5:.6g})"

    def local(w: int) -> str:
        return f"{start} causal & (window({w}) | global({sinks}))"

    wider = [round(window * by) for by in WIDER if window * by < length]
    lines = {w: local(w) for w in (window, *wider)} | {0: f"{local(window)} delta({GAMMA}, dense=causal, tail={TAIL})"}
    calls = {str(w): (lambda w=w: run(lines[w], attentions, corrected=w == 0)) for w in lines}
    wanted = run(f"{start} causal", attentions)
    errors = {w: sum(map(error, run(lines[w], attentions, corrected=w == 0), wanted)) / len(wanted) for w in lines}
    times: dict[str, Timing] = in_turn(calls, seconds=seconds)
    took = {w: times[str(w)].median for w in lines}
    equal = next((w for w in wider if took[w] >= took[0]), wider[-1])
    return Corrected(
        name, length, sinks, window, errors[window], took[window], errors[0], took[0], equal, errors[equal], took[equal]
    )


def run(line: str, attentions: Sequence[Rows], corrected: bool = False) -> list[Tensor]:
    operator = torch.ops.attnopt.tvm_sparse if corrected else torch.ops.attnopt.tvm_attention
    return [operator(q, k, v, [], line) for q, k, v in attentions]


def table(found: list[Corrected]) -> str:
    cells = [
        [x.model, str(x.length), str(x.sinks), str(x.window), f"{x.error:.4f}", ms(x.seconds), f"{x.delta_error:.4f}", ms(x.delta_seconds),
         str(x.equal_window), f"{x.equal_error:.4f}", ms(x.equal_seconds)]
        for x in found
    ]  # fmt: skip
    return harness.markdown(COLUMNS, cells)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def goals(found: list[Corrected]) -> str:
    lines = [
        f"- {x.model}, {x.length}, window {x.window}: delta {'lowers' if x.delta_error < x.error else 'does NOT lower'} the error of the "
        f"window, and is {'better' if x.delta_error < x.equal_error else 'NOT better'} than a window of {x.equal_window} at its time"
        for x in found
    ]
    return "\n".join(lines) + "\n"
