"""attnopt's methods for weights, applied to every linear layer of the blocks at one width and group, on a copy of a host.

Bench(subject, host).rows(wish)   ->   (method, (copy, bits per weight) or why not), one after the other
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attnopt.analysis.evidence import Evidence
from attnopt.analysis.store import Store
from attnopt.ir.graph import Node
from attnopt.ir.site import Host, Refusal
from attnopt.passes import Gptq, Pass, QuestRounding, RoundWeights, Rsq
from attnopt.passes.candidate import Computes
from attnopt.passes.weight_rounding import Wish
from attnopt.plan.memory.memory import numbers, stored_bits
from attnopt.plan.options.groups import Grouping
from attnopt.rounding.grids import Gridding

if TYPE_CHECKING:
    from quantize.subjects import Subject


@dataclass(frozen=True)
class Method:
    name: str
    rewrite: Pass
    note: str = ""


def methods(wish: Wish) -> list[Method]:
    wishes = (wish,)
    return [
        Method("RTN", RoundWeights(wishes=wishes), "best clip of each group"),
        Method("RTN, no clip", RoundWeights(wishes=wishes, gridding=Gridding("extremes")), "max-abs steps"),
        Method("GPTQ", Gptq(wishes=wishes)),
        Method("QuEST", QuestRounding(wishes=wishes), "Hadamard, Gaussian grid, no data"),
        Method("rotated GPTQ", Rsq(wishes=wishes, least=1.0, protect=0.0), "RSQ with all tokens alike"),
        Method("RSQ", Rsq(wishes=wishes, protect=0.0), "r_min 0.005"),
        Method("RSQ, nothing at run time", Rsq(wishes=wishes, protect=0.0, mix=False), "no Hadamard blocks before down_proj"),
        Method("RSQ, layer after layer", Rsq(wishes=wishes, protect=0.0), "moments of the model rounded so far"),
    ]


@dataclass
class Bench:
    """One subject in one host, with what calibration saw."""

    subject: Subject
    host: Host

    def __post_init__(self) -> None:
        self.grouping = Grouping(self.host)
        store = Store(self.subject.folder / f"{self.subject.name}-{self.host.kind}")
        store.folder.mkdir(exist_ok=True)  # type: ignore[union-attr]
        self.evidence = Evidence(self.host, self.subject.data(self.host), sites=self.grouping.sites, store=store)

    def applied(self, rewrite: Pass, in_turn: bool = False) -> tuple[Host, float] | Refusal:
        """A copy with every block rounded, and the bits per weight of what was. in_turn: layer after layer, where a pass offers that."""
        copy = self.host.copy()
        there = {g.name: g for g in Grouping(copy).of(rewrite.per)}
        bits = count = 0.0
        refused: Refusal | None = None
        for group in self.grouping.of(rewrite.per):
            inside = tuple(n for n in group.linears if self.counts(n))
            if not inside:
                continue
            proposed = rewrite.propose(replace(group, linears=inside), self.evidence)
            if isinstance(proposed, Refusal):
                refused = proposed
                continue
            candidate = proposed[-1 if in_turn else 0]
            if isinstance(rewrite, Computes):
                arrays = rewrite.arrays(candidate, replace(group, linears=inside), self.evidence)
                if isinstance(arrays, Refusal):
                    return arrays
                candidate = replace(candidate, arrays=arrays)
            rewrite.apply(candidate, replace(there[group.name], host=copy))
            for node in candidate.nodes:
                bits += numbers(node) * stored_bits(node, candidate.storage[node.name])
                count += numbers(node)
        if not count:
            return refused or Refusal("no linear layer")
        copy.finish()
        return copy, bits / count

    def counts(self, node: Node) -> bool:
        """Whether a layer is rounded: all but the head."""
        weight = node.inputs[1]
        return weight is not None and weight.shape is not None and self.subject.vocabulary not in weight.shape

    def rows(self, wish: Wish, only: tuple[str, ...] = ()) -> Iterator[tuple[Method, tuple[Host, float] | Refusal]]:
        for method in methods(wish):
            if not only or method.name in only:
                yield method, self.applied(method.rewrite, method.name.endswith("layer after layer"))
