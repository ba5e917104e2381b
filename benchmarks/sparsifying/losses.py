"""What a form loses: at each attention alone on the rows that the model sends there, and everywhere at once."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import trained_models
from quantize.attention import Reference
from quantize.subjects import Measured
from recall_task import recall_batch

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.analysis.operands import held, tapped
from attnopt.codegen.tvm.lowerings.tvm_prefill import TvmPrefill
from attnopt.codegen.tvm.lowerings.tvm_sparse import TvmSparse
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.expr import Term
from attnopt.ir.reference import Attended, attend
from attnopt.ir.site import Host
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import recognise
from attnopt.plan.choose import emit
from sparsifying.forms import FORMS, LONG, chance, spec_of, visible, window

KERNELS = (TvmSparse(), TvmPrefill())
COLUMNS = [
    "model", "length", "form", "kept", "recall", "error", "recall by chance", "error by chance", "window", "error of the window", "KL",
    "KL of the window",
]  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """A form on one model at one length. Numbers are means over attentions and samples; by chance: None in rows of runs that had none."""

    model: str
    length: int
    form: str
    kept: float
    recall: float
    error: float
    chance_recall: float | None
    chance_error: float | None
    window: int
    window_error: float
    kl: float
    kl_half: float
    window_kl: float
    part: str = "losses"

    @property
    def key(self) -> tuple[str, int, str]:
        return (self.model, self.length, self.form)

    @property
    def whole(self) -> bool:
        """Whether nothing of it is left to measure."""
        return self.chance_error is not None


ROW = Loss


@dataclass(frozen=True, eq=False)
class Alone:
    """One attention on the rows that the model sends there: its spec under a causal mask alone, and what that gives."""

    spec: AttentionSpec
    q: Tensor
    k: Tensor
    v: Tensor
    pairs: int

    @property
    def dense(self) -> Attended:
        return attend(self.spec, self.q, self.k, self.v)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def subjects(quick: bool) -> Iterator[tuple[str, int, nn.Module, list[dict[str, Tensor]]]]:
    """Name, length, model, and batches of one sample each: where the models are good, and at what they reach at most."""
    lengths = {"code-lm": {256: 2} if quick else {1024: 6, 2048: 2}, "recall": {256: 2} if quick else {1024: 6, 1900: 2}}
    for length, count in lengths["code-lm"].items():
        samples = trained_models.code_windows(count, length).split(1)
        yield "code-lm", length, Logits(trained_models.code_lm()), [{"input_ids": x} for x in samples]
    for length, count in lengths["recall"].items():
        recalled = [recall_batch(1, 32, length, seed).tokens for seed in range(count)]
        yield "recall", length, Logits(trained_models.recall_model()), [{"input_ids": x} for x in recalled]


@torch.no_grad()
def rows(quick: bool, done: Collection[object]) -> Iterator[Loss]:
    for name, length, model, batches in subjects(quick):
        forms = dict(list(FORMS.items())[::5]) if quick else FORMS if length <= 1024 else {form: FORMS[form] for form in LONG}
        left = {form: line for form, line in forms.items() if (name, length, form) not in done}
        if not left:
            continue
        host = FxHost.from_captured(capture(model.eval(), dict(batches[0])))
        tokens = batches[0]["input_ids"].shape[1]
        run = host.runner()
        wanted = [torch.as_tensor(run(batch)[0]) for batch in batches]
        kept_windows: dict[int, Measured] = {}
        attentions = list(each_alone(host, batches[:1]))
        for form, line in left.items():
            kept, recall, error, by_chance, chance_error, window_error = at_each(attentions, line)
            width = window(tokens, kept)
            if width not in kept_windows:
                kept_windows[width] = divergence(everywhere(host, f"window({width})"), batches, wanted)
            lost = divergence(everywhere(host, line), batches, wanted)
            yield Loss(name, length, form, kept, recall, error, by_chance, chance_error, width, window_error, lost.mean, lost.half,
                       kept_windows[width].mean)  # fmt: skip


def each_alone(host: Host, batches: list[dict[str, Tensor]]) -> Iterator[Alone]:
    """Every attention on every batch."""
    sites = recognise(host.graph).sites
    evidence = Evidence(host, Calibration.of(host.graph, list(batches)), sites=sites)
    for site in sites:
        for inputs, data in evidence.hold(tapped(site)):
            on = held(site, dict(zip(tapped(site), data, strict=True)), host.graph.sizes(inputs))
            spec = site.spec.with_(mask=Term("causal"))  # one document, no padding
            yield Alone(spec, on.q, on.k, on.v, int(visible(spec, on.q, on.k, on.v).sum()))


def at_each(attentions: Sequence[Alone], line: str) -> list[float]:
    """Kept, recall, error, recall and error by chance, error of a window as wide: means over attentions and samples."""
    found = [measured(on, line) for on in attentions]
    return [sum(column) / len(found) for column in zip(*found, strict=True)]


def measured(on: Alone, line: str) -> list[float]:
    q, k, v, spec, dense = on.q, on.k, on.v, spec_of(on.spec, line), on.dense
    seen = visible(spec, q, k, v)
    kept = float(seen.sum() / on.pairs)
    found = [kept, recalled(dense.weights, seen), error(attend(spec, q, k, v).output, dense.output)]
    random, tiles = chance(spec, q, k, v)
    tried = attend(random, q, k, v, **tiles)
    found += [recalled(dense.weights, tried.weights > 0), error(tried.output, dense.output)]
    narrow = spec_of(on.spec, f"window({window(k.shape[2], kept)})")
    return [*found, error(attend(narrow, q, k, v).output, dense.output)]


def recalled(weights: Tensor, seen: Tensor) -> float:
    return float((weights * seen).sum(-1).mean())


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def everywhere(host: Host, line: str) -> Host:
    """A copy in which every attention has this form, by TVM's kernels where they compute it, else as its spec means."""
    made, replaced = host.copy(), {}
    for site in recognise(made.graph).sites:
        sparse = site.with_step("sparsify", spec_of(site.spec, line))
        kernel = next((x for x in KERNELS if x.supports(sparse, "torch") is None), Reference())
        replaced[site.output.value] = emit(made, sparse.reading(replaced), kernel)
    made.finish()
    return made


def divergence(host: Host, batches: list[dict[str, Tensor]], wanted: list[Tensor]) -> Measured:
    run, found = host.runner(), []
    for batch, logits in zip(batches, wanted, strict=True):
        p, q = logits.log_softmax(-1), torch.as_tensor(run(batch)[0]).log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1).mean())
    return Measured.of(torch.stack(found))


def in_order(found: list[Loss]) -> list[Loss]:
    """By model, length and form: a row that was measured again comes last in the file."""
    forms = list(FORMS)
    return sorted(found, key=lambda x: (x.model, x.length, forms.index(x.form) if x.form in forms else len(forms)))


def table(found: list[Loss]) -> str:
    def number(x: float | None) -> str:
        return "" if x is None else f"{x:.3f}"

    cells = [
        [x.model, str(x.length), x.form, f"{x.kept:.0%}", number(x.recall), number(x.error), number(x.chance_recall),
         number(x.chance_error), str(x.window), number(x.window_error), str(Measured(x.kl, x.kl_half)), f"{x.window_kl:.2e}"]
        for x in in_order(found)
    ]  # fmt: skip
    return harness.markdown(COLUMNS, cells)


def goals(found: list[Loss]) -> str:
    lines = []
    for x in in_order(found):
        against = [("chance", x.chance_error), ("a window of as many keys", x.window_error)]
        said = [f"{'better' if x.error < other else 'NOT better'} than {name}" for name, other in against if other is not None]
        lines.append(f"- {x.model}, {x.length}, {x.form}: {' and '.join(said)} by error")
    return "\n".join(lines) + "\n"
