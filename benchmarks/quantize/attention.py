"""Products of attention in few bits: what each variant of SageAttention2 loses on real queries, keys and values.

Every variant is computed by the reference semantics of its spec, which rounds as the kernels round: at each attention alone, on the rows
that the float model sends there (cosine and relative error of its output), and everywhere at once (KL of the language model, 1 - cosine
of embeddings). Time is a matter of GPUs: benchmarks/gpu_attention.py.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import harness
import torch
from torch import Tensor

from attnopt.analysis.evidence import Evidence
from attnopt.analysis.operands import held, tapped
from attnopt.analysis.padding import Padding
from attnopt.codegen.operator_call import call_operator
from attnopt.codegen.triton.lowerings.triton_prefill import TritonPrefill
from attnopt.ir.clause import Clause
from attnopt.ir.graph import Value
from attnopt.ir.reference import attend
from attnopt.ir.site import Builder, Host, Site
from attnopt.ir.spec import parse
from attnopt.passes.quantize.sage_attention import precision
from attnopt.patterns import recognise
from attnopt.plan.choose import emit
from quantize.subjects import Measured, Subject, code_lm, sentence_encoder

GOAL = 0.999  # cosine
BATCHES = 3  # of each subject, for what happens at one attention
COLUMNS = ["model", "variant", "least cosine", "cosine", "relative error", "loss", "perplexity", "kernel"]


@dataclass(frozen=True)
class Loss:
    """One variant. cosine, error: of the outputs of single attentions, means over them; least: of the worst of them."""

    model: str
    variant: str
    least: float
    cosine: float
    error: float
    loss: float
    half: float
    perplexity: float | None
    kernel: str


def changed(clause: Clause, **options: object) -> Clause:
    """The clause with other options; None leaves one out."""
    kept = {**dict(clause.options), **options}
    return Clause(clause.name, (), tuple((name, value) for name, value in kept.items() if value is not None))  # type: ignore[misc]


def variants() -> dict[str, Clause]:
    """What the pass proposes, and beside it what each step of the method is worth."""
    half, eight, four = precision("int8", "fp16"), precision("int8", "fp8"), precision("int4", "fp8")
    rows = {"q_group": eight.signature.options["q_group"][1], "k_group": eight.signature.options["k_group"][1]}
    blocks = {name: dict(precision_of("row // 128", "k // 64").options)[name] for name in rows}
    return {
        "int8, fp16": half,
        "int8, fp8": eight,
        "int8, fp8, v smoothed": precision("int8", "fp8", smooth_values=True),
        "int8, fp8 summed in fp16": changed(eight, sum="fp16"),
        "int8, fp8, k not smoothed": changed(eight, k_smooth=None),
        "int8, fp8, scales per block": changed(eight, **blocks),
        "int4, fp8": four,
        "int4, fp16": changed(precision("int8", "fp16"), q="int4", k="int4", q_smooth=dict(four.options)["q_smooth"]),
        "int4, fp8, q not smoothed": changed(four, q_smooth=None),
        "int4, fp8, nothing smoothed": changed(four, q_smooth=None, k_smooth=None),
        "int4, fp8, scales per block": changed(four, **blocks),
    }


def precision_of(q_group: str, k_group: str) -> Clause:
    clause = parse(f"softmax precision(q=int8, k=int8, q_group={q_group}, k_group={k_group})").precision
    assert clause is not None
    return clause


@torch.no_grad()
def alone(subject: Subject, clauses: dict[str, Clause]) -> dict[str, tuple[float, float, float]]:
    """(least cosine, mean cosine, mean relative error) of the attentions of a subject, by variant. Padding does not count."""
    host = subject.torch
    evidence = Evidence(host, subject.data(host), sites=recognise(host.graph).sites)
    padding = Padding.of(host.graph)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in clauses}
    for site in recognise(host.graph).sites:
        sums = {name: torch.zeros(4, dtype=torch.float64) for name in clauses}
        for at, (inputs, data) in enumerate(evidence.hold(tapped(site))):
            if at == BATCHES:
                break
            on = held(site, dict(zip(tapped(site), data, strict=True)), host.graph.sizes(inputs))
            real = padding.rows(site.size("q"), len(on.q), on.q.shape[2], inputs)
            wanted = attend(site.spec, on.q, on.k, on.v, **on.operands).output
            for name, clause in clauses.items():
                got = attend(site.spec.with_(precision=clause), on.q, on.k, on.v, **on.operands).output
                sums[name] += products(got, wanted, real)
        for name, (both, mine, whole, apart) in sums.items():
            found[name].append((float(both / (mine * whole).sqrt()), float((apart / whole).sqrt())))
    return {
        name: (min(c for c, _ in each), sum(c for c, _ in each) / len(each), sum(e for _, e in each) / len(each))
        for name, each in found.items()
    }


def products(got: Tensor, wanted: Tensor, real: Tensor | None) -> Tensor:
    """Sums of got * wanted, got², wanted² and (got - wanted)² over the rows that count."""
    counts = torch.ones(()) if real is None else real[:, None, :, None]
    a, b = (x.double() * counts for x in (got, wanted))
    return torch.stack([(a * b).sum(), a.square().sum(), b.square().sum(), (a - b).square().sum()])


def everywhere(host: Host, clause: Clause) -> Host:
    """A copy in which every attention is the operator that carries the spec: on a CPU it computes what the spec means."""
    made, replaced = host.copy(), {}
    for site in recognise(made.graph).sites:
        rounded = site.with_step("sage-attention", site.spec.with_(precision=clause))
        replaced[site.output.value] = emit(made, rounded.reading(replaced), Reference())
    made.finish()
    return made


@torch.library.custom_op("attnopt_benchmarks::reference", mutates_args=())
def reference_operator(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    """The meaning of a spec as an operator: kernels refuse some of the variants that are compared here."""
    parsed = parse(spec)
    made = attend(parsed, q.float(), k.float(), v.float(), **dict(zip(parsed.operands, operands, strict=True)))
    return made.output.to(q.dtype).contiguous()


@reference_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


class Reference(TritonPrefill):
    """A lowering that calls it."""

    def emit(self, site: Site, builder: Builder) -> Value:
        return call_operator(torch.ops.attnopt_benchmarks.reference.default, site, builder)


def kernel(site: Site, clause: Clause) -> str:
    """yes, or why the prefill family has no kernel."""
    refused = TritonPrefill().supports(replace(site, spec=site.spec.with_(precision=clause)), "torch")
    return "Triton" if refused is None else refused.reason.split(":")[0]


def lost(subject: Subject, clauses: dict[str, Clause]) -> Iterator[Loss]:
    single = alone(subject, clauses)
    site = recognise(subject.torch.graph).sites[0]
    for name, clause in clauses.items():
        loss, perplexity = subject.loss(everywhere(subject.torch, clause).runner())
        yield Loss(subject.name, name, *single[name], loss.mean, loss.half, perplexity, kernel(site, clause))


def run(quick: bool, resume: bool = False) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    notes = [
        "variant: type of q and k, type of p and v; scales per thread, k smoothed, int4 with q smoothed too, where nothing else is said",
        f"cosine and relative error: of the outputs of single attentions over {BATCHES} batches, means of all; the least is of the worst",
        "loss: KL in nats per token of code-lm, 1 - cosine of MiniLM's embeddings, every attention rounded; mean ± half of the interval",
        "v smoothed by the mean of all tokens, padding too: padded texts lose by it",
    ]
    clauses = variants()
    if quick:
        clauses = dict(list(clauses.items())[::6])
    losses = harness.kept("quantize_attention", Loss) if resume else list[Loss]()
    with tempfile.TemporaryDirectory() as folder:
        for make in (code_lm, sentence_encoder):
            subject = make(Path(folder), quick)
            there = {x.variant for x in losses if x.model == subject.name}
            for each in lost(subject, {name: clause for name, clause in clauses.items() if name not in there}):
                losses.append(each)
                print(each, flush=True)
                if not quick:
                    path = harness.save("quantize_attention", losses, notes)
                    path.with_suffix(".md").write_text(text_of(losses, notes))
    print(text_of(losses, notes))


def text_of(losses: list[Loss], notes: list[str]) -> str:
    rows = [
        [
            x.model, x.variant, f"{x.least:.6f}", f"{x.cosine:.6f}", f"{x.error:.2e}", str(Measured(x.loss, x.half)),
            "" if x.perplexity is None else f"{x.perplexity:.4f}", x.kernel,
        ]
        for x in losses
    ]  # fmt: skip
    said = [f"- {x.model}, {x.variant}: least cosine {x.least:.6f}, {'over' if x.least > GOAL else 'not over'} {GOAL}"
            for x in losses if x.variant in ("int8, fp16", "int8, fp8")]  # fmt: skip
    parts = ["# Attention in few bits: loss\n", "\n".join(f"- {note}" for note in notes) + "\n", harness.markdown(COLUMNS, rows)]
    return "\n".join([*parts, "\n".join(said) + "\n"])
