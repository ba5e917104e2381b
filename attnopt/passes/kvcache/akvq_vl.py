"""Keep the cache in 2 or 4 bits in a Hadamard basis, and exactly only where attention rests: pivot tokens and the newest ones.

    k, v   ->   k H, v H, rounded by token in groups of 128 channels, levels over 0.8 of the range at 2 bits; back to k, v when read
    layers that rest on pivots:   the pivots and the last 128 tokens exact, all others in 2 bits
    layers that read their text:  the last 128 tokens exact, all others in 4 bits

    k -> k H, q -> q H leaves every score as it is, since H H' = 1; outliers of single channels spread over all of them first.

H of values is folded into the layers around them where nothing stands between, and H of keys where no position turns them
(`edits.caches.basis`): a candidate of its own, because it changes weights that other passes may want to round. Elsewhere, and in the
other candidates, rows are turned when they come and turned back when they are read.
The paper is on vision-language models: text tokens have 4 bits and images 2 in its text-salient layers. In a language model all
tokens are text, so a layer is either of pivots (2 bits) or of text (4 bits). It is of text where, in calibration, more than `text` of
the attention goes to tokens that would be rounded; without calibration every layer counts as one of pivots.
Which tokens are pivots the paper reads from outliers of the residual stream, which the graph of one decoding step never sees for past
tokens; in language models they stand at the beginning, so here they are the first `pivots` tokens (at most 15, as there).

Source: "AKVQ-VL: Attention-Aware KV Cache Adaptive 2-Bit Quantization for Vision-Language Models".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.caches.basis import basis_refusal, turned_layers
from attnopt.passes.edits.caches.plan import applied, codes, unfit
from attnopt.passes.edits.caches.rows import Rows
from attnopt.passes.edits.caches.slots import SIDES, Slot, slots
from attnopt.passes.edits.caches.state import Kept

SOURCE = "AKVQ-VL"


@dataclass(frozen=True)
class AkvqVl:
    """Keep the cache in 2 or 4 bits in a Hadamard basis, pivot tokens and the newest ones exact.

    recent: newest tokens that stay exact. pivots: first tokens that do, in layers that rest on them. group: channels that share a
    scale. clip: share of the range that 2-bit levels cover. text: share of attention on rounded tokens that makes a layer one of text.
    """

    name: str = "akvq-vl"
    exact: bool = False
    per: Per = "model"
    recent: int = 128
    pivots: int = 15
    group: int = 128
    clip: float = 0.8
    text: float = 0.1

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        held = slots(group)
        if isinstance(held, Refusal):
            return held
        if (refusal := unfit(held, self.kept(False))) is not None:
            return refusal
        of_text = {s.site.name: self.reads_text(s.site, evidence) for s in held}
        folds = {(s.site.name, s.side): basis_refusal(group, s.site.name, s.side) is None for s in held}
        texts = {"": dict.fromkeys(of_text, False), **({"calibration": of_text} if any(of_text.values()) else {})}
        found = []
        for needs, text in texts.items():
            for fold in (False, True) if any(folds.values()) else (False,):
                found.append(self.candidate(group, held, text, folds if fold else {}, needs))
        return found

    def candidate(
        self, group: Group, held: Sequence[Slot], text: Mapping[str, bool], folds: Mapping[tuple[str, str], bool], needs: str
    ) -> Candidate:
        """text: the layers that read their text. folds: sites and sides whose basis stands in the weights."""

        def form(slot: Slot) -> Kept:
            kept = self.kept(text[slot.site.name])
            return replace(kept, rows=replace(kept.rows, folded=folds.get((slot.site.name, slot.side), False)))

        sides = dict.fromkeys(side for (_, side), there in folds.items() if there)
        basis = f"the basis of {' and '.join(SIDES[s] for s in SIDES if s in sides)} folded into weights" if sides else ""
        count = f"{sum(text.values())} layers that read their text in 4 bits" if needs else ""
        kind = ("bits by layer" if needs else "2-bit pivots") + ", folded" * bool(sides)
        note = ", ".join(part for part in (count, basis) if part)
        nodes = [n for n in group.linears if n in turned_layers(group, folds)]
        return codes(
            group, self.name, kind, held, form, source=SOURCE, note=note, needs="calibration" if needs else "nothing", nodes=nodes
        )

    def kept(self, of_text: bool) -> Kept:
        rows = Rows(bits=4 if of_text else 2, group=self.group, scales="fp16", clip=1.0 if of_text else self.clip, turned=True)
        return Kept(rows, first=0 if of_text else self.pivots, recent=self.recent)

    def reads_text(self, site: Site, evidence: Evidence | None) -> bool:
        seen = None if evidence is None else evidence.attention(site)
        return seen is not None and 1 - float(seen.kept(first=self.pivots, window=self.recent).mean()) > self.text

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it."""
        return applied(candidate, group)
