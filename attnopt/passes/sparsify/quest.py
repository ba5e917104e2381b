"""Let each query of a decoding step read the few pages of the cache that may hold its largest scores.

    softmax scale(s) causal   ->   softmax scale(s) causal pages(16, 64, recent=1), its page minima and maxima in and out beside the keys

A page is 16 tokens; the newest is always read. Nothing is evicted: another step may choose another page. The first two attentions read all
keys, as in the source. What a caller passes on changes: keys with the two bounds of their pages where keys were. In the source each query
head chooses for itself; candidates where the heads that share keys choose together read a page once for all of them.

Source: "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from attnopt.ir.at_end import AT_END
from attnopt.ir.site import Refusal, Site
from attnopt.ir.spec import AttentionSpec
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.caches.pages import Pages, keep_pages, unfit
from attnopt.passes.edits.caches.slots import Slot, slots
from attnopt.passes.sparsity import UNSEEN, changed

Pairs = Sequence[tuple[Slot, Slot]]


@dataclass(frozen=True)
class Quest:
    """Let each query of a decoding step read the few pages of the cache that may hold its largest scores.

    size: tokens of a page. budgets: tokens that a query reads at most. dense: so many first attentions read all.
    """

    size: int = 16
    budgets: tuple[int, ...] = (1024, 256)
    dense: int = 2
    name: str = "quest"
    exact: bool = False
    per: Per = "model"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        held = slots(group)
        if isinstance(held, Refusal):
            return held
        if evidence is None:
            return Refusal("what the other pages hold is weighed on calibration data, and there are none")
        pairs = self.pairs(group, held)
        if isinstance(pairs, Refusal):
            return pairs
        forms = [Pages(self.size, max(3, budget // self.size), together) for budget in self.budgets for together in (False, True)]
        past, present = zip(*((k.past, k.present) for k, _ in pairs), strict=True)
        refused = group.host.refuses_split(past, present, [forms[0].parts(k) for k, _ in pairs])
        if refused is not None:
            return refused
        asked, found = {k.site.name for k, _ in pairs}, []

        def meanings(site: Site) -> list[AttentionSpec]:
            return [meant(site.spec, pages) for pages in forms] if site.name in asked else []

        seen = [evidence.left_out(k.site, self.name, meanings) for k, _ in pairs]
        for i, pages in enumerate(forms):
            left = [each[i] for each in seen if each is not None]
            if left and max(one.mean for one in left) > UNSEEN:
                found.append(self.candidate(pages, pairs, left))
        least = min(p.keys for p in forms)
        return found or Refusal(f"no calibration sequence has more than {least} keys: nothing says what the other pages hold")

    def pairs(self, group: Group, held: Sequence[Slot]) -> Pairs | Refusal:
        """Keys and values of the attentions that choose pages, or why there are none."""
        late = {site.name for site in group.sites[self.dense :]}
        found = [(k, v) for k, v in by_site(held) if k.site.name in late]
        refused = [(unfit(k.site, k, v), k, v) for k, v in found]
        fit = [(k, v) for why, k, v in refused if why is None]
        if fit:
            return fit
        nothing = Refusal(f"no attention after the first {self.dense} has keys and values in a cache of its own")
        return next((why for why, _, _ in refused if why is not None), nothing)

    def candidate(self, pages: Pages, pairs: Pairs, left: Sequence[Any]) -> Candidate:
        dropped, worst = (max(getattr(each, name) for each in left) for name in ("mean", "worst"))
        kept, bound = sum(each.kept for each in left) / len(left), max(each.bound for each in left)
        who = "heads that share keys choose" if pages.together else "each head chooses"
        return Candidate(
            self.name,
            False,
            f"{who} {pages.count} pages of {pages.size} in {len(pairs)} attentions: shows {kept:.0%} of the keys, leaves out {dropped:.2g} "
            f"of the weight of one of them ({worst:.2g} of one query's at most), and so changes an output by at most {bound:.2g}; "
            "keys come and go with the bounds of their pages",
            "Quest",
            options={
                "sites": [k.site.name for k, _ in pairs], "pages": vars(pages), "dropped": dropped, "worst": worst, "kept": kept,
                "bound": bound,
            },
            kind=f"{pages.keys} tokens{' together' if pages.together else ''}",
            changes=("selection", "cache", "structure"),
            shapes={k.site.name: {"k": pages.keys} for k, _ in pairs},
            needs="calibration",
        )  # fmt: skip

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it."""
        held, pages = slots(group), Pages(**candidate.options["pages"])
        assert not isinstance(held, Refusal)
        chosen = [(k, v, pages) for k, v in by_site(held) if k.site.name in candidate.options["sites"]]
        return keep_pages(group, chosen)


def meant(spec: AttentionSpec, pages: Pages) -> AttentionSpec:
    """The reference of the choice: the query is that of the newest key, also where its spec needs no position."""
    return changed(spec, pages.clause).with_(offset=AT_END)


def by_site(held: Sequence[Slot]) -> Iterator[tuple[Slot, Slot]]:
    """Keys and values of each attention that has both in a cache of its own."""
    for k in (slot for slot in held if slot.side == "k"):
        v = next((slot for slot in held if slot.side == "v" and slot.site.name == k.site.name), None)
        if v is not None:
            yield k, v
