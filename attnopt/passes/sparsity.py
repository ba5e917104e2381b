"""Sparser forms of an attention as candidates, ordered by the weight that calibration data say they leave out.

    forms: "block_topk(64, 4)", "causal & window(64) …"   ->   one candidate each, with what it drops, keeps, and changes at most

A form is written as what it adds to the spec: a part of the mask, a selection, a correction. Leaving out keys of weight m changes an
output by at most 2 m max|v|, with a correction as much again for the row that it was taken from. A form that leaves nothing out on any
calibration sequence is not offered: what it loses elsewhere is unknown. Used by the passes of sparsify/ that are forms and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from attnopt.ir.expr import Term, conjunction, conjuncts, operands
from attnopt.ir.site import Refusal, Site
from attnopt.ir.spec import AttentionSpec, parse
from attnopt.passes.candidate import Candidate, Change, Evidence, Group

TILE = 64  # keys: a kernel computes as many at a time
UNSEEN = 1e-9  # less weight than this was on no key at all: a softmax leaves none out
SLOTS: tuple[Change, ...] = ("mask", "selection", "correction")
Lines = Callable[[Site], "Mapping[str, str] | Refusal"]  # what each form is called -> what it adds


def proposed(name: str, source: str, lines: Lines, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
    """The candidates of a pass for one site, the least loss first. lines: its forms of a site, or why it has none."""
    (site,) = group.sites
    refused = refuse(site, group.host.kind)
    own = lines(site) if refused is None else refused
    if isinstance(own, Refusal):
        return own

    if evidence is not None and evidence.longest(site) <= TILE:
        return Refusal(
            f"no calibration sequence is longer than the {TILE} keys of a tile: nothing says what it would lose", site.name
        )

    def forms(each: Site) -> list[AttentionSpec]:
        found = lines(each) if refuse(each, group.host.kind) is None else {}
        return [] if isinstance(found, Refusal) else [changed(each.spec, line) for line in found.values()]

    seen = None if evidence is None else evidence.left_out(site, name, forms)
    if seen is None:
        return Refusal("what it leaves out is weighed on calibration data, and there are none", site.name)
    offered = [(*form, found) for form, found in zip(own.items(), seen, strict=True) if found.mean > UNSEEN]
    if not offered:
        return Refusal("on no calibration sequence does it leave anything out: nothing says what it would lose", site.name)
    offered.sort(key=lambda each: each[2].mean)
    return [candidate(name, source, *form) for form in offered]


def candidate(name: str, source: str, kind: str, line: str, found: Any) -> Candidate:
    """One form with what it leaves out (`analysis.left_out.LeftOut`)."""
    slots = tuple(slot for slot in SLOTS if getattr(parse(f"softmax {line}"), slot) is not None)
    bound = found.corrected_bound if "correction" in slots else found.bound
    return Candidate(
        name,
        False,
        f"{kind}: shows {found.kept:.0%} of the pairs, leaves out {found.mean:.2g} of the weight ({found.worst:.2g} of one "
        f"query's at most), and so changes an output by at most {bound:.2g} on average",
        source,
        options={"adds": line, "dropped": found.mean, "worst": found.worst, "kept": found.kept, "bound": bound},
        kind=kind,
        changes=slots,
        needs="calibration",
    )


def applied(candidate: Candidate, group: Group) -> Group:
    """The group with the form in the spec of its site."""
    (site,) = group.sites
    return replace(group, sites=(site.with_step(candidate.pass_name, changed(site.spec, candidate.options["adds"])),))


def changed(spec: AttentionSpec, adds: str) -> AttentionSpec:
    """The spec with a narrower mask, a selection or a correction."""
    found = parse(f"softmax {adds}")
    mask = conjunction(*conjuncts(spec.mask), *conjuncts(found.mask))
    return spec.with_(mask=mask, selection=found.selection or spec.selection, correction=found.correction or spec.correction)


def causal(site: Site) -> bool:
    """Whether the mask has `causal` as a part."""
    return Term("causal") in conjuncts(site.spec.mask)


def refuse(site: Site, host: str) -> Refusal | None:
    """None where fewer tiles are sure to mean less work here, and a kernel takes their list."""
    spec = site.spec
    if host != "torch":
        return Refusal("no operator of ONNX takes a list of tiles", site.name)
    if spec.normalizer.name != "softmax" or spec.special:
        return Refusal(f"it is no plain softmax: {next(iter(spec.special), spec.normalizer)}", site.name)
    if any(part != Term("causal") and not operands(part) for part in conjuncts(spec.mask)):
        return Refusal(f"its mask '{spec.mask}' hides more than later keys already", site.name)
    if site.weights_used is not None:
        return Refusal("the attention weights themselves are read", site.weights_used)
    if site.size("q") != site.size("k"):
        return Refusal("queries and keys are not the same positions: a cache selects rows instead", site.name)
    return None
