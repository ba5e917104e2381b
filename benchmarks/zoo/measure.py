"""What one model type measures: truth, covered, false, specs, lifted terms, seconds, and what the exact rewrite changes."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

import attnopt
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.dims import product
from attnopt.ir.graph import Graph
from attnopt.ir.site import Refusal, Site
from attnopt.patterns import fused, recognise, spelled_out
from attnopt.patterns.normalizer import anchors
from zoo.lifted import counts
from zoo.subject import subject
from zoo.truth import Truth


@dataclass
class Record:
    """One type in one attention implementation. `error`: why it could not be exported; `rewrite_error`: why not rewritten.

    truth, covered, false: softmaxes that are attention, those that a site holds, sites without one. specs: lines with counts.
    lifted, tensors: mask and bias terms of all sites that are expressions, and that are still tensors.
    difference: of all outputs after the exact rewrite, relative to the largest element of its output (at least 1).
    """

    model_type: str
    attention: str
    error: str = ""
    truth: int = 0
    covered: int = 0
    false: int = 0
    softmaxes: int = 0
    nodes: int = 0
    dynamic: str = ""
    specs: dict[str, int] = field(default_factory=dict)
    lifted: int = 0
    tensors: int = 0
    missed: list[dict[str, str]] = field(default_factory=list)
    wrong: list[dict[str, str]] = field(default_factory=list)
    fused: int = 0
    difference: float | None = None
    rewrite_error: str = ""
    export_seconds: float = 0.0
    recognise_seconds: float = 0.0

    @property
    def applies(self) -> bool:
        """Whether the type has this attention implementation at all."""
        return "does not support an attention implementation" not in self.error


def measured(model_type: str, attention: str) -> Record:
    record = Record(model_type, attention)
    started = time.process_time()
    try:
        made = subject(model_type, attention)
        captured = capture(made.model, made.inputs)
        host = FxHost.from_captured(captured)
    except Exception as failure:
        record.error = said(failure)
        return record
    record.export_seconds = time.process_time() - started
    record.dynamic = captured.dynamic
    try:
        compare(record, host)
    except Exception as failure:
        record.error = f"recognition fails: {said(failure)}"
        return record
    rewrite(record, captured.program)
    return record


def said(failure: BaseException) -> str:
    """Its kind and its words, without the folders of the machine that it was raised on."""
    words = re.sub(r"(/[\w.-]+)+/(?=site-packages/)", "", " ".join(str(failure).split()))
    return f"{type(failure).__name__}: {words[:300]}"


def names_of(site: Site) -> set[str]:
    """The FX names behind a site's nodes; a canonical node keeps the name of the FX node it came from."""
    return {node.name for node in site.nodes}


def compare(record: Record, host: FxHost) -> None:
    """Recognise, and hold what was found against the truth."""
    truth = Truth(host.module.graph)
    started = time.process_time()
    found = recognise(host.graph)
    record.recognise_seconds = time.process_time() - started
    record.nodes = len(host.module.graph.nodes)
    record.truth, record.softmaxes = len(truth.softmaxes), len(truth.all)
    covered = {name for site in found.sites for name in names_of(site)}
    record.covered = sum(name in covered for name in truth.softmaxes)
    for site in found.sites:
        line = str(site.spec)
        record.specs[line] = record.specs.get(line, 0) + 1
        lifted, tensors = counted_terms(site, truth)
        record.lifted, record.tensors = record.lifted + lifted, record.tensors + tensors
        if not names_of(site) & set(truth.softmaxes):
            record.wrong.append({"site": site.name, "spec": line, "line": site.source.line})
    record.false = len(record.wrong)
    if record.covered < record.truth:
        reasons = refusals_by_anchor(host.graph)
        record.missed = [missed(name, host.graph, reasons) for name in truth.softmaxes if name not in covered]


def counted_terms(site: Site, truth: Truth) -> tuple[int, int]:
    """Mask and bias terms of a site that are expressions, and that are tensors."""
    shapes = {name: operand.value.shape for name, operand in site.operands.items() if operand.value.shape is not None}
    products = frozenset(name for name, operand in site.operands.items() if truth.is_score(operand.value.name))
    return counts(site.spec, shapes, product((site.size("q"), site.size("k"))), products)


def refusals_by_anchor(graph: Graph) -> dict[str, Refusal]:
    """The refusal of each softmax: the families answer anchor by anchor, in order."""
    answers = [*zip(anchors(graph), spelled_out(graph), strict=True)]
    found = {anchor.node.name: answer for anchor, answer in answers if isinstance(answer, Refusal)}
    for node, answer in zip(graph.of("attention"), fused(graph), strict=True):
        if isinstance(answer, Refusal):
            found[node.name] = answer
    return found


def missed(softmax: str, graph: Graph, reasons: Mapping[str, Refusal]) -> dict[str, str]:
    """Why a softmax that is attention was not claimed."""
    refusal = reasons.get(softmax)
    if refusal is None:
        node = next((n for n in graph.nodes if n.name == softmax), None)
        refusal = Refusal("the normaliser was not seen as one", node)
    return {
        "softmax": softmax, "reason": refusal.reason, "reached": refusal.reached, "remedy": refusal.remedy, "node": refusal.node,
        "line": refusal.source.line, "module": refusal.source.module,
    }  # fmt: skip


def rewrite(record: Record, program: torch.export.ExportedProgram) -> None:
    """Every exact rewrite on the example inputs, and how far the outputs move."""
    if not record.specs:
        return
    try:
        report = attnopt.optimize(program, select="always").report
    except Exception as failure:
        record.rewrite_error = said(failure)
        return
    record.fused = report.fused
    record.difference = report.difference.max_rel if report.difference is not None else None
