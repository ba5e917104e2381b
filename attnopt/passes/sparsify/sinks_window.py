"""Let each query see the first keys of the sequence and its last ones, and nothing between.

    softmax scale(s) causal & padding   ->   softmax scale(s) causal & padding & (window(64) | global(4))

Per layer: each site chooses its own sinks and window. Attention without a causal mask looks as far ahead as back. With weight m on
the keys that are left out, an output changes by at most 2 m max|v|; calibration measures m and orders the candidates, the measured loss
decides. A window that no calibration sequence reaches beyond is not offered: its loss there is zero, and unknown elsewhere.
Time falls with the keys that are left: local attention visits no others.

Sources: StreamingLLM ("Efficient Streaming Language Models with Attention Sinks"), and the base pattern of "Delta Attention"; the bound
is that of the dropped mass that sparse methods share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnopt.ir.band import band
from attnopt.ir.dims import Dim
from attnopt.ir.expr import Apply, Expr, Term, apply, conjunction, conjuncts
from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per

UNSEEN = 1e-9  # less weight than this was on no key at all: a softmax leaves none out
SOURCE = "Efficient Streaming Language Models with Attention Sinks"


@dataclass(frozen=True)
class SinksWindow:
    """Let each query see the first keys of the sequence and its last ones, and nothing between.

    sinks: how many first keys. windows: how many last ones, the query's own among them.
    """

    sinks: tuple[int, ...] = (4, 16)
    windows: tuple[int, ...] = (1024, 512, 256, 128, 64)
    name: str = "sinks-window"
    exact: bool = False
    per: Per = "site"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        (site,) = group.sites
        refusal = refuse(site)
        if refusal is not None:
            return refusal
        length = site.size("k")
        found = [(s, w) for w in self.windows for s in self.sinks if not covers(s + w, length)]
        if not found:
            return Refusal(f"the smallest window covers all {length} keys", site.name)
        seen = None if evidence is None else evidence.attention(site)
        if seen is None:
            return Refusal("what lies outside of a window is weighed on calibration data, and there are none", site.name)
        ranked = []
        for s, w in found:
            kept = seen.kept(s, w, 0 if looks_back(site) else w)
            dropped, most = 1.0 - float(kept.mean()), 1.0 - float(kept.min())
            if dropped > UNSEEN:
                ranked.append((s, w, dropped, 2.0 * most * float(seen.v.max_abs.max())))
        if not ranked:
            why = f"no calibration sequence reaches beyond a window of {min(self.windows)}: nothing says what it would lose"
            return Refusal(why, site.name)
        ranked.sort(key=lambda c: (c[2], -c[1], -c[0]))
        return [self.candidate(site, *c) for c in ranked]

    def candidate(self, site: Site, sinks: int, window: int, dropped: float, bound: float) -> Candidate:
        return Candidate(
            self.name,
            False,
            f"{sinks} sinks and a window of {window}: leaves out {dropped:.2g} of the weight, "
            f"and so changes an output by at most {bound:.2g}",
            SOURCE,
            options={"sinks": sinks, "window": window, "dropped": dropped, "bound": bound},
            kind=f"sinks {sinks} window {window}",
            changes=("mask",),
            needs="calibration",
        )

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """The group with the new mask in the spec of its site."""
        (site,) = group.sites
        local = near(candidate.options["sinks"], candidate.options["window"], looks_back(site))
        spec = site.spec.with_(mask=conjunction(*conjuncts(site.spec.mask), local))
        return replace(group, sites=(site.with_step(self.name, spec),))


def near(sinks: int, window: int, back: bool) -> Expr:
    """window(w) | global(s), and as far ahead where the mask does not say that only earlier keys are seen; 0 sinks are none."""
    beside: Expr = Term("window", (window,))
    if not back:
        beside = apply("and", beside, Term("lookahead", (window,)))
    return Apply("or", (beside, Term("global", (sinks,)))) if sinks else beside


def looks_back(site: Site) -> bool:
    """Whether a query sees no later key, whatever the data."""
    found = band(conjunction(*conjuncts(site.spec.mask), Term("window", (1,))))
    return found is not None and found.ahead == 0


def covers(keys: int, length: Dim) -> bool:
    return isinstance(length, int) and keys >= length


def refuse(site: Site) -> Refusal | None:
    """None where a narrower mask is sure to mean less work here, and the reference knows what it means."""
    known = band(site.spec.mask)
    if known is not None:
        return Refusal(f"its mask '{site.spec.mask}' has a window already", site.name)
    if site.spec.normalizer.name != "softmax" or site.spec.selection is not None:
        return Refusal("it is no plain softmax over all keys", site.name)
    if site.weights_used is not None:
        return Refusal("the attention weights themselves are read", site.weights_used)
    if site.spec.offset is not None or site.size("q") != site.size("k"):
        return Refusal("queries and keys are not the same positions: a cache drops rows instead, by its own policy", site.name)
    return None
