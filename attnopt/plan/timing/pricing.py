"""What an option saves: seconds by the cost model, or by what was measured in its place.

    int8 of down_proj      before: linear 192 x 512 in float32      after: the same, weights as int8      saved: the difference

Where all options of a kind and shape were timed together in the model, each saves the measured share of what it touches. A kind that was
not timed is predicted as wrongly as the timed kinds of the same passes: windows of 128 as windows of 256.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from attnopt.cost.nodes import estimate_nodes
from attnopt.ir.site import Refusal
from attnopt.plan.memory.memory import touched
from attnopt.plan.options.proposals import Proposal
from attnopt.plan.options.workshop import Workshop

ORIGINAL = "eager"  # the price of a site whose own nodes stay, where these are not one kernel


@dataclass(frozen=True)
class Load:
    """Sizes of the model's symbols, and the weight of what they take in the whole."""

    sizes: Mapping[str, int]
    weight: float = 1.0


@dataclass(frozen=True)
class Timed:
    """What so many options of one key saved together, the predicted seconds of all that they touch, and what they were predicted to save.

    passes: that made them.
    """

    saved: float
    touched: float
    options: int
    promised: float = 0.0
    passes: tuple[str, ...] = ()

    def share(self, touched: float) -> float:
        """Of one option: by what it touches; equal shares where the cost model knows no price."""
        return self.saved * touched / self.touched if self.touched > 0 else self.saved / self.options


@dataclass
class Prices:
    """Predictions for one model on one target, each made once. timed: what was measured, by key."""

    workshop: Workshop
    loads: Sequence[Load]
    timed: dict[tuple[str, str], Timed] = field(default_factory=dict)
    known: dict[Proposal, tuple[float, float]] = field(default_factory=dict)
    keys: dict[Proposal, tuple[str, str]] = field(default_factory=dict)

    def saved(self, proposal: Proposal) -> float:
        """Seconds that an option saves, weighted over the loads: as its kind was measured to, else as predicted beside its kin."""
        known = self.measured(proposal)
        return self.beside_kin(proposal) if known is None else known

    def measured(self, proposal: Proposal) -> float | None:
        """Seconds that an option saves by measurement; None where its kind was not timed."""
        if proposal.moves and all(m.narrows for m in proposal.moves):
            return 0.0  # what was measured is noise
        timed = self.timed.get(self.key(proposal), self.timed.get((proposal.kind, "")))
        return None if timed is None else timed.share(self.predicted(proposal)[0])

    def beside_kin(self, proposal: Proposal) -> float:
        """Predicted seconds saved, in the proportion in which kinds of the same passes saved what they had promised; where these saved what
        was predicted to cost, or cost what was predicted to save, by as much more or less of what is touched.
        """
        before, after = self.predicted(proposal)
        kin = [t for key, t in self.timed.items() if t.passes == passes_of(proposal) and key[1] in ("", self.key(proposal)[1])]
        saved, promised = sum(t.saved for t in kin), sum(t.promised for t in kin)
        if saved > 0 and promised > 0:
            return (before - after) * saved / promised
        reach = sum(t.touched for t in kin)
        return before - after + ((saved - promised) * before / reach if reach > 0 else 0.0)

    def predicted(self, proposal: Proposal) -> tuple[float, float]:
        """Predicted seconds of what an option touches, as it is and as the option makes it."""
        if proposal not in self.known:
            pairs = [(load.weight, *self.at(proposal, load.sizes)) for load in self.loads]
            self.known[proposal] = sum(w * before for w, before, _ in pairs), sum(w * after for w, _, after in pairs)
        return self.known[proposal]

    def at(self, proposal: Proposal, sizes: Mapping[str, int]) -> tuple[float, float]:
        before = after = 0.0
        shop = self.workshop
        for move in proposal.moves:
            candidate, storage = move.candidate, move.candidate.storage
            nodes = touched(candidate.removes, {**storage, **dict.fromkeys(candidate.layers, "")}, move.group.linears)
            gone = {n.name for n in candidate.removes}
            before += estimate_nodes(nodes, sizes, shop.target, runtime=shop.runtime).seconds
            kept = [n for n in nodes if n.name not in gone]
            after += estimate_nodes(
                kept, sizes, shop.target, runtime=shop.runtime, weights=storage, widths=candidate.layers
            ).seconds
            for site in (s for s in move.group.sites if s.name in candidate.shapes):
                kernel = shop.kernels.get(site.name)
                name = kernel.name if kernel else ORIGINAL
                before += shop.seconds(site, name, sizes)
                after += shop.seconds(site, name, sizes, candidate.shapes[site.name])
        for site, changed in proposal.specs():
            lowering, held = shop.kernel_for(changed), shop.kernels.get(site.name)
            if not isinstance(lowering, Refusal):
                before += shop.seconds(site, held.name if held else ORIGINAL, sizes)
                after += shop.seconds(changed, lowering.name, sizes)
        return before, after

    def key(self, proposal: Proposal) -> tuple[str, str]:
        """Kind and shape: options of one key save the same."""
        if proposal not in self.keys:
            layers = sorted(str(n.inputs[1].shape) for m in proposal.moves for n in m.group.linears if n.inputs[1] is not None)
            sites = sorted(f"{s.spec} {s.shape}" for m in proposal.moves for s in m.group.sites)
            self.keys[proposal] = proposal.kind, "; ".join([*layers, *sites])
        return self.keys[proposal]


def passes_of(proposal: Proposal) -> tuple[str, ...]:
    """The names of the passes that an option is made by."""
    return tuple(m.rewrite.name for m in proposal.moves)
