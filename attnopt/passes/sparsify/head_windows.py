"""Sinks plus window in the heads that look no further, while the others keep all keys.

    softmax scale(s) causal   ->   softmax scale(s) causal & (window(64) | global(4) | h == 3 | h == 5)

Heads of one attention differ: most look near, some fetch from anywhere. A head keeps all keys where sinks and window would leave out
more than a share of its weight on calibration data; the kernel visits the tiles that each head has.

Sources: StreamingLLM ("Efficient Streaming Language Models with Attention Sinks"); which heads stay whole is our choice, by their dropped
mass, the bound of sparse methods.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.sparsity import applied, causal, proposed


@dataclass(frozen=True)
class HeadWindows:
    """Sinks plus window in the heads that look no further, while the others keep all keys.

    windows: (sinks, window). shares: of its weight that a head may lose and be narrow.
    """

    windows: tuple[tuple[int, int], ...] = ((16, 256), (4, 64))
    shares: tuple[float, ...] = (0.05,)
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
        return found or Refusal("its heads are alike: all look further than a window, or none does", site.name)

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """The group with the new mask in the spec of its site."""
        return applied(candidate, group)
