"""What became of one site: the spec that it computes now, its kernel, and why.

softmax causal, sdpa   + window(64)                 ->   softmax causal & window(64), local-sdpa
                       + int8 cache                 ->   softmax causal cache(k=int8, v=int8), tvm-decode on the codes
                       + 2-bit cache                ->   softmax causal cache(k=int2, v=int2), sdpa on what is read back
                       + the layer is removed       ->   nothing, removed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnopt.codegen.lowering import Lowering
from attnopt.ir.site import Refusal, Site
from attnopt.ir.spec import as_spec
from attnopt.plan.choose import Chosen
from attnopt.plan.options.proposals import Move
from attnopt.plan.options.workshop import Workshop
from attnopt.report.data import ORIGINAL, REMOVED, Choice, SiteReport


def site_reports(chosen: Sequence[Chosen], moves: Sequence[Move], shop: Workshop) -> tuple[SiteReport, ...]:
    """One for each site. shop: in which the moves were made, or another on the same model."""
    readers = shop.readers(moves)
    return tuple(site_report(c, moves, shop, readers.get(c.site.name)) for c in chosen)


def site_report(chosen: Chosen, moves: Sequence[Move], shop: Workshop, reader: Lowering | None = None) -> SiteReport:
    """Times are those of the kernel that was chosen for the exact plan; of one for a new spec, which was predicted, there are none.

    reader: the kernel that reads the cache of the site as the moves let it come and go.
    """
    site = chosen.site
    own = [m for m in moves if any(s.name == site.name for s in m.group.sites)]
    kernel = chosen.lowering.name if chosen.lowering else ORIGINAL
    exact = SiteReport(
        name=site.name,
        before=str(site.spec),
        after=str(site.spec),
        shape={axis: str(size) for axis, size in site.shape.items()},
        kernel=kernel,
        why=chosen.why,
        steps=site.steps if chosen.lowering else (),
        seconds_before=chosen.seconds_before,
        seconds_after=chosen.seconds_after,
        choices=chosen.choices,
    )
    last = {n.name for n in site.nodes[-1:]}
    if (move := next((m for m in own if last & {n.name for n in m.candidate.removes}), None)) is not None:
        untaken = tuple(replace(c, taken=False) for c in exact.choices)
        why, steps = move.candidate.kind or move.candidate.description, (move.rewrite.name,)
        return replace(exact, after="", kernel=REMOVED, why=why, steps=steps, seconds_after=0.0, choices=untaken)
    after = rewritten(site, own)
    cached = next((c for m in reversed(own) if (c := m.candidate.cached.get(site.name))), "")
    spec = after.spec.with_(cache=as_spec(f"softmax {cached}").cache) if cached else after.spec
    named = tuple(m.rewrite.name for m in own if not m.edits or site.name in m.candidate.cached)
    report = replace(exact, after=str(spec), steps=(*exact.steps, *named))
    if reader is not None and after is site:
        return replace(report, kernel=reader.name, why="reads the cache as it is stored", seconds_after=None)
    return report if after is site else with_kernel(report, shop, after)


def rewritten(site: Site, moves: Sequence[Move]) -> Site:
    """The site with the specs of these moves in the order that they are made."""
    after = site
    for move in moves:
        if not move.edits:
            group = replace(move.group, sites=tuple(after if s.name == site.name else s for s in move.group.sites))
            after = next(s for s in move.rewrite.apply(move.candidate, group).sites if s.name == site.name)
    return after


def with_kernel(report: SiteReport, shop: Workshop, after: Site) -> SiteReport:
    """The report with the kernel that computes the new spec, which the workshop put in."""
    lowering = shop.kernel_for(after)
    if isinstance(lowering, Refusal):
        return replace(report, kernel=ORIGINAL, why=lowering.reason, seconds_after=None)
    why = "predicted to compute the new spec fastest"
    choices = (Choice(lowering.name, True, why), *(replace(c, taken=False) for c in report.choices))
    return replace(report, kernel=lowering.name, why=why, seconds_after=None, choices=choices)
