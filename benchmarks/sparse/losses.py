"""What a form loses: at each attention alone on the rows that the model sends there, and everywhere at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
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
from attnopt.ir.reference import attend
from attnopt.ir.site import Host
from attnopt.patterns import recognise
from attnopt.plan.choose import emit
from sparse.forms import FORMS, chance, spec_of, visible, window

KERNELS = (TvmSparse(), TvmPrefill())
COLUMNS = ["model", "form", "kept", "recall", "error", "recall by chance", "error by chance", "window", "error of the window", "KL",
           "KL of the window"]  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """A form on one model. Numbers are means over attentions and samples; by chance: NaN where the form chooses no blocks."""

    model: str
    form: str
    kept: float
    recall: float
    error: float
    chance_recall: float
    chance_error: float
    window: int
    window_error: float
    kl: float
    kl_half: float
    window_kl: float


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def subjects(quick: bool) -> Iterator[tuple[str, nn.Module, list[dict[str, Tensor]]]]:
    """Name, model, and batches of one sample each."""
    length, count = (256, 2) if quick else (1024, 6)
    samples = trained_models.code_windows(count, length).split(1)
    yield "code-lm", Logits(trained_models.code_lm()), [{"input_ids": x} for x in samples]
    recalled = [recall_batch(1, 32, length, seed).tokens for seed in range(count)]
    yield "recall", Logits(trained_models.recall_model()), [{"input_ids": x} for x in recalled]


@torch.no_grad()
def rows(quick: bool) -> Iterator[Loss]:
    forms = dict(list(FORMS.items())[::5]) if quick else FORMS
    for name, model, batches in subjects(quick):
        host = FxHost.from_captured(capture(model.eval(), dict(batches[0])))
        length = batches[0]["input_ids"].shape[1]
        run = host.runner()
        wanted = [torch.as_tensor(run(batch)[0]) for batch in batches]
        kept_windows: dict[int, Measured] = {}
        alone = at_each(host, batches[:1], forms)
        for form, line in forms.items():
            kept, recall, error, by_chance, chance_error, window_error = (float(x) for x in alone[form])
            width = window(length, kept)
            if width not in kept_windows:
                kept_windows[width] = divergence(everywhere(host, f"window({width})"), batches, wanted)
            lost = divergence(everywhere(host, line), batches, wanted)
            yield Loss(name, form, kept, recall, error, by_chance, chance_error, width, window_error, lost.mean, lost.half,
                       kept_windows[width].mean)  # fmt: skip


def at_each(host: Host, batches: list[dict[str, Tensor]], forms: Mapping[str, str]) -> dict[str, Tensor]:
    """For each form kept, recall, error, recall and error by chance, error of a window: means over attentions and samples."""
    sites = recognise(host.graph).sites
    evidence = Evidence(host, Calibration.of(host.graph, list(batches)), sites=sites)
    sums = {form: torch.zeros(6, dtype=torch.float64) for form in forms}
    count = 0
    for site in sites:
        for inputs, data in evidence.hold(tapped(site)):
            on = held(site, dict(zip(tapped(site), data, strict=True)), host.graph.sizes(inputs))
            plain = site.spec.with_(mask=Term("causal"))  # one document, no padding
            dense, count = attend(plain, on.q, on.k, on.v), count + 1
            pairs = visible(plain, on.q, on.k, on.v).sum()
            for form, line in forms.items():
                spec = spec_of(plain, line)
                seen = visible(spec, on.q, on.k, on.v)
                kept = float(seen.sum() / pairs)
                found = [kept, recalled(dense.weights, seen), error(attend(spec, on.q, on.k, on.v).output, dense.output)]
                random = chance(spec, on.q, on.k, on.v)
                if random is None:
                    found += [float("nan"), float("nan")]
                else:
                    tried = attend(random[0], on.q, on.k, on.v, **random[1])
                    found += [recalled(dense.weights, tried.weights > 0), error(tried.output, dense.output)]
                narrow = spec_of(plain, f"window({window(on.k.shape[2], kept)})")
                found.append(error(attend(narrow, on.q, on.k, on.v).output, dense.output))
                sums[form] += torch.tensor(found, dtype=torch.float64)
    return {form: total / count for form, total in sums.items()}


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


def table(found: list[Loss]) -> str:
    def number(x: float) -> str:
        return "" if x != x else f"{x:.3f}"

    cells = [
        [x.model, x.form, f"{x.kept:.0%}", number(x.recall), number(x.error), number(x.chance_recall), number(x.chance_error),
         str(x.window), number(x.window_error), str(Measured(x.kl, x.kl_half)), f"{x.window_kl:.2e}"]
        for x in found
    ]  # fmt: skip
    return harness.markdown(COLUMNS, cells)


def goals(found: list[Loss]) -> str:
    lines = []
    for x in found:
        against = [("chance", x.chance_error), ("a window of as many keys", x.window_error)]
        said = [f"{'better' if x.error < other else 'NOT better'} than {name}" for name, other in against if other == other]
        lines.append(f"- {x.model}, {x.form}: {' and '.join(said)} by error")
    plain = {x.model: x for x in found if x.form == "4 sinks and window 64"}
    for x in found:
        if "delta" in x.form:
            base = plain[x.model]
            lines.append(
                f"- {x.model}, {x.form}: error {x.error:.3f} against {base.error:.3f} without, KL {x.kl:.2e} against {base.kl:.2e}"
            )
    return "\n".join(lines) + "\n"
