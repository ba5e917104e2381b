"""The pace of generation as the cost model predicts it, for the loads that are measured beside it.

    a prompt of L tokens, one more token on a cache of L   ->   seconds of layers and of attentions, before and after a plan

Layers are priced on the traced graph with the storage and widths that the plan's steps give them, attentions by the kernels that the live
layers hold. A step's layers are those of a prompt of one token. Codes of a cache are read by the layer's kernel for them, or whole for each
step, in plain torch. Keys that are narrow in the cache alone are lifted and turned in plain torch as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attnopt.cost.estimate import estimate, of_phases
from attnopt.cost.kernels import KERNELS
from attnopt.cost.nodes import estimate_nodes
from attnopt.cost.phase import Phase
from attnopt.cost.target import Target
from attnopt.cost.workload import Bound
from attnopt.errors import WorkloadError
from attnopt.hosts.module.host import ModuleHost
from attnopt.hosts.module.interface import HELD
from attnopt.hosts.module.layer_attention import LayerAttention, OnCodes, OnPages
from attnopt.ir.by_layer import CacheForm, of_layer
from attnopt.ir.clause import Clause
from attnopt.ir.packing import row_bytes
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec, parse
from attnopt.patterns import recognise
from attnopt.plan.live.converting import Live
from attnopt.plan.live.generating import Pace, on_prompts, usual
from attnopt.report.plan import PlanStep

CODES = 4.0  # operations on a number that is read from its code: cast, shifted by the middle and by its zero point, scaled
MOVED = 4 + 3 * 8  # bytes that these move: the first writes the number, each other reads and writes it
LIFTED, TURNS = (
    7,
    12.0,
)  # numbers that are moved for one that is lifted and turned, in two products and two passes; calls of torch
WRITES, READS = 10.0, 20.0  # calls of torch in one layer, both sides: what comes is rounded and written, the cache is read


@dataclass(frozen=True)
class Foretold:
    """own: the kernel of the model's own attention. keep: the share of a prompt's tokens that a policy keeps. pages: those read.
    original: the model before its folds, where it had any."""

    host: ModuleHost
    target: Target
    own: str
    codes: CacheForm | None = None
    keep: float = 1.0
    pages: Clause | None = None
    original: ModuleHost | None = None

    def paces(self, made: Live, steps: Sequence[PlanStep], length: int) -> dict[str, Pace]:
        """Before and after; empty where the traced model cannot have such a prompt."""
        sites = recognise(self.host.graph).sites
        try:
            prompt, one = on_prompts(usual(length)).bind(sites)
        except WorkloadError:
            return {}
        plain = replace(self, host=self.original or self.host, codes=None, keep=1.0, pages=None)
        first = recognise(plain.host.graph).sites
        return {
            "before": Pace(*(plain.seconds(b, first, Live(made.model), (), length, at) for at, b in enumerate((prompt, one)))),
            "after": Pace(*(self.seconds(b, sites, made, steps, length, at) for at, b in enumerate((prompt, one)))),
        }

    def seconds(self, bound: Bound, sites: Sequence[Site], made: Live, steps: Sequence[PlanStep], length: int, at: int) -> float:
        """at: 0 for a prompt, 1 for one query on a cache."""
        storage, widths, shapes = (merged([getattr(s, name) for s in steps]) for name in ("storage", "layers", "shapes"))
        inside = {id(node) for site in sites for node in site.nodes}
        removed = {name for s in steps for name in s.removes}
        rest = [n for n in self.host.graph.nodes if id(n) not in inside and n.name not in removed]
        total = estimate_nodes(rest, bound.sizes, self.target, weights=storage, widths=widths).seconds
        gone = {c.path for c in made.changes if c.kind == "no-attention"}
        lifted = {c.path: c.options["keys"] for c in made.changes if c.kind == "widths" and "turn" in c.options}
        for site in (s for s in sites if s.source.module not in gone):
            shape = {**bound.shape(site), **shapes.get(site.name, {})}
            if at:
                shape |= {"q": 1, "k": math.ceil(length * self.keep)}
            total += self.attention(site, shape, made, at)
            if site.source.module in lifted:
                total += self.lifted(site, shape, lifted[site.source.module])
            if (codes := self.clause(site, made)) is not None:
                total += self.unpacked(codes, site, shape, whole=not at or self.on_codes(site, made) is None)
        return total

    def on_codes(self, site: Site, made: Live) -> OnCodes | None:
        """The kernel by which a layer reads codes; None where it reads them back, or there are none."""
        held: LayerAttention | None = getattr(made.model.get_submodule(site.source.module), HELD, None)
        found = None if held is None or self.codes is None else held.on_codes
        return found if found is not None and found.run is not None and found.clause == self.clause(site, made) else None

    def clause(self, site: Site, made: Live) -> Clause | None:
        """How the cache of a layer is stored."""
        return None if self.codes is None else of_layer(self.codes, made.model.get_submodule(site.source.module).layer_idx)

    def on_pages(self, site: Site, made: Live, length: int) -> OnPages | None:
        """The kernel by which a layer reads few pages of so many tokens; None where it reads all."""
        held: LayerAttention | None = getattr(made.model.get_submodule(site.source.module), HELD, None)
        found = None if held is None or self.pages is None else held.on_pages
        return found if found is not None and found.run is not None and found.chooses(length) else None

    def attention(self, site: Site, shape: Mapping[str, int], made: Live, at: int) -> float:
        held = made.layers.get(site.source.module)
        by_kernel = held is not None and not (at and shape["k"] < held.least)
        name = (held.names[at] if held is not None and by_kernel else "") or self.own
        if at and (kernel := self.on_codes(site, made)) is not None:
            dtype = site.q.value.dtype or "float32"
            return estimate(AttentionSpec(cache=kernel.clause), shape, dtype, kernel.name, target=self.target).seconds
        if at and (choice := self.on_pages(site, made, shape["k"])) is not None:
            spec = AttentionSpec(selection=choice.clause)
            return estimate(spec, shape, site.q.value.dtype or "float32", choice.name, target=self.target).seconds
        spec = AttentionSpec() if at else site.spec if held is None else parse(held.spec)
        dtype = site.q.value.dtype or "float32"
        return estimate(spec, shape, dtype, name if name in KERNELS else self.own, target=self.target).seconds

    def lifted(self, site: Site, shape: Mapping[str, int], kept: int) -> float:
        """Seconds in which one layer makes whole keys of those that it keeps, of so many channels."""
        rows, width = float(shape["b"] * shape["g"] * shape["k"]), shape["d"]
        moved = 4 * rows * (2 * kept + LIFTED * width)
        made = Phase("lift", "linear", flops=4 * rows * kept * width, rows=rows, launches=0.0)
        turned = Phase("turn", "elementwise", operations=3 * rows * width, bytes=moved, working_set=moved, launches=TURNS)
        return of_phases([made, turned], site.q.value.dtype or "float32", self.target).seconds

    def unpacked(self, codes: Clause, site: Site, shape: Mapping[str, int], whole: bool) -> float:
        """Seconds in which one layer rounds what comes, and (whole) reads its cache from codes into numbers."""
        rows = shape["b"] * shape["g"] * shape["k"]
        numbers = float(rows * (shape["d"] + shape["e"])) if whole else 0.0
        kept = rows * sum(row_bytes(codes, side, shape[axis], 4) for side, axis in (("k", "d"), ("v", "e"))) if whole else 0.0
        moved, calls = kept + MOVED * numbers, WRITES + READS * whole
        phase = Phase("codes", "elementwise", operations=CODES * numbers, bytes=moved, working_set=moved, launches=calls)
        return of_phases([phase], site.q.value.dtype or "float32", self.target).seconds


def merged(given: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for each in given for name, value in each.items()}
