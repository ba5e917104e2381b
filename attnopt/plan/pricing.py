"""What an option saves: seconds by the cost model, or by what was measured in its place; bytes of weights.

    int8 of down_proj      before: linear 192 x 512 in float32      after: the same, weights as int8      saved: the difference

Where all options of a kind and shape were timed together in the model, each saves the measured share of what it touches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from attnopt.cost.nodes import estimate_nodes
from attnopt.ir.cost import WIDTHS
from attnopt.ir.graph import Node
from attnopt.ir.site import Refusal
from attnopt.plan.proposals import Proposal
from attnopt.plan.workshop import Workshop
from attnopt.rounding.weight_format import WeightFormat

ORIGINAL = "eager"  # the price of a site whose own nodes stay, where these are not one kernel


@dataclass(frozen=True)
class Load:
    """Sizes of the model's symbols, and the weight of what they take in the whole."""

    sizes: Mapping[str, int]
    weight: float = 1.0


@dataclass(frozen=True)
class Timed:
    """What so many options of one key saved together, and the predicted seconds of all that they touch."""

    saved: float
    touched: float
    options: int

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
        """Seconds that an option saves, weighted over the loads: as its kind was measured to, else as predicted."""
        before, after = self.predicted(proposal)
        known = self.measured(proposal)
        return before - after if known is None else known

    def measured(self, proposal: Proposal) -> float | None:
        """Seconds that an option saves by measurement; None where its kind was not timed."""
        timed = self.timed.get(self.key(proposal), self.timed.get((proposal.kind, "")))
        return None if timed is None else timed.share(self.predicted(proposal)[0])

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
            nodes, storage = touched(move.candidate.removes, move.candidate.storage, move.group.linears), move.candidate.storage
            gone = {n.name for n in move.candidate.removes}
            before += estimate_nodes(nodes, sizes, shop.target, runtime=shop.runtime).seconds
            kept = [n for n in nodes if n.name not in gone]
            after += estimate_nodes(kept, sizes, shop.target, runtime=shop.runtime, weights=storage).seconds
        for site, changed in proposal.specs():
            lowering, held = shop.kernel_for(changed), shop.kernels.get(site.name)
            if not isinstance(lowering, Refusal):
                before += shop.seconds(site, held.name if held else ORIGINAL, sizes)
                after += shop.seconds(changed, lowering.name, sizes)
        return before, after

    def bytes_saved(self, proposal: Proposal) -> float:
        """Bytes of weights that an option leaves out or stores narrower; a weight that others read too stays beside its narrow form."""
        total = 0.0
        for move in proposal.moves:
            gone = {n.name for n in move.candidate.removes}
            for node in touched(move.candidate.removes, move.candidate.storage, move.group.linears):
                weight = node.inputs[1] if numbers(node) else None
                if weight is None:
                    continue
                width = WIDTHS.get(weight.dtype, 32)
                left = 0 if node.name in gone else stored_bits(node, move.candidate.storage[node.name], width)
                kept = any(user is not node and user.name not in move.candidate.touches for user in weight.users)
                total += numbers(node) * (width * (not kept) - left) / 8
        return total

    def key(self, proposal: Proposal) -> tuple[str, str]:
        """Kind and shape: options of one key save the same."""
        if proposal not in self.keys:
            layers = sorted(str(n.inputs[1].shape) for m in proposal.moves for n in m.group.linears if n.inputs[1] is not None)
            sites = sorted(f"{s.spec} {s.shape}" for m in proposal.moves for s in m.group.sites)
            self.keys[proposal] = proposal.kind, "; ".join([*layers, *sites])
        return self.keys[proposal]


def stored_bits(node: Node, storage: str, width: float) -> float:
    """Bits for each weight of a layer under a storage; those it has now where nothing is known of it."""
    format = WeightFormat.read(storage)
    if format is None or node.inputs[1] is None or node.inputs[1].shape is None:
        return WIDTHS.get(storage, width)
    inputs = node.inputs[1].shape[1 if node.op == "linear" else 0]
    return format.width(inputs) if isinstance(inputs, int) else width


def touched(removes: Sequence[Node], storage: Mapping[str, str], linears: Sequence[Node]) -> list[Node]:
    """The nodes whose price an option changes, each once."""
    return list({n.name: n for n in (*removes, *(n for n in linears if n.name in storage))}.values())


def numbers(node: Node) -> int:
    """Numbers in the weight of a linear layer; 0 for any other node."""
    weight = node.inputs[1] if node.op in ("linear", "matmul") else None
    known = weight is not None and weight.is_constant and all(isinstance(d, int) for d in weight.shape or ())
    return math.prod(weight.shape or ()) if known and weight is not None else 0  # type: ignore[arg-type]
