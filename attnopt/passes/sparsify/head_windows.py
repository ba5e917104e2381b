"""Sinks plus a window for each head of an attention, as wide as the head looks; a head that looks further than all of them keeps all keys.

    softmax scale(s) causal   ->   softmax scale(s) causal & (window(64) | global(4) | h == 3)
                                   softmax scale(s) causal & (global(16) | window(64) | window(256) & (h == 1 | h == 5) | h == 3)

Heads of one attention differ: most look near, some fetch from anywhere. A head gets the narrowest window by which it loses no more than
a share of its weight on calibration data; the kernel visits the tiles that each head has. Candidates: one window for the heads that it
suits, and a window for each.

Sources: StreamingLLM ("Efficient Streaming Language Models with Attention Sinks"); which heads stay whole is our choice, by their dropped
mass, the bound of sparse methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnopt.ir.dims import Dim
from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.sparsity import applied, causal, proposed


@dataclass(frozen=True)
class HeadWindows:
    """Sinks plus a window for each head of an attention, as wide as the head looks.

    windows: (sinks, window) for heads that it suits, a candidate each. shares: of its weight that a head may lose. widths: of which each
    head gets its own, beside `sinks`.
    """

    windows: tuple[tuple[int, int], ...] = ((16, 256), (4, 64))
    shares: tuple[float, ...] = (0.05,)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    sinks: int = 16
    name: str = "head-windows"
    exact: bool = False
    per: Per = "site"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        if evidence is None:
            return Refusal("which heads look far is seen on calibration data, and there are none", group.name)
        return proposed(self.name, "StreamingLLM", lambda site: self.lines(site, evidence), group, evidence)

    def lines(self, site: Site, evidence: Evidence) -> dict[str, str] | Refusal:
        seen = evidence.attention(site)
        if not causal(site) or seen is None:
            return Refusal(
                "windows look back, in heads that were seen to: it needs a causal mask and calibration data", site.name
            )
        length, found = site.size("k"), {}
        for sinks, window in self.windows:
            if isinstance(length, int) and sinks + window >= length:
                continue
            dropped = 1.0 - seen.kept(sinks, window, 0)
            for share in self.shares:
                whole = (dropped > share).nonzero().flatten().tolist()
                if 0 < len(whole) < len(dropped):
                    heads = " | ".join(f"h == {i}" for i in whole)
                    kind = f"{sinks} sinks and window {window} in {len(dropped) - len(whole)} of {len(dropped)} heads"
                    found[kind] = f"(window({window}) | global({sinks}) | {heads})"
        for share in self.shares:
            found |= self.own(seen, length, share)
        return found or Refusal("its heads are alike: all look further than a window, or none does", site.name)

    def own(self, seen: Any, length: Dim, share: float) -> dict[str, str]:
        """A window for each head; nothing where all have the same."""
        widths = [w for w in sorted(self.widths) if not (isinstance(length, int) and self.sinks + w >= length)]
        suits = [(1.0 - seen.kept(self.sinks, w, 0) <= share).tolist() for w in widths]
        chosen = (
            [next((w for w, heads in zip(widths, suits, strict=True) if heads[i]), 0) for i in range(len(suits[0]))]
            if suits
            else []
        )
        if len(set(chosen) - {0}) < 2:
            return {}
        arms = [f"global({self.sinks})"]
        for width in sorted(set(chosen)):
            heads = " | ".join(f"h == {i}" for i, w in enumerate(chosen) if w == width)
            arms.append(heads if not width else f"window({width}) & ({heads})")
        kind = f"{self.sinks} sinks and a window for each head that loses at most {share:.2g}"
        return {kind: f"({' | '.join(arms)})"}

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """The group with the new mask in the spec of its site."""
        return applied(candidate, group)
