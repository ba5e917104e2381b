"""Let each query see every second (fourth, …) of the keys before it, so that as many keys reach further.

    softmax scale(s) causal   ->   softmax scale(s) causal & (window(64) | window(512) & dilated(8))

Nearest keys are all seen; without a causal mask it looks as far ahead as back. A kernel that works in tiles saves nothing inside the
window, where every tile has a key that is seen: it saves what lies beyond.

Source: "Longformer: The Long-Document Transformer" (dilated sliding window).
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.sparsity import applied, causal, proposed


@dataclass(frozen=True)
class DilatedWindow:
    """Let each query see every second (fourth, …) of the keys before it, so that as many keys reach further.

    windows: (keys that are all seen, how far it reaches, every which key of those is seen).
    """

    windows: tuple[tuple[int, int, int], ...] = ((64, 512, 4),)
    name: str = "dilated-window"
    exact: bool = False
    per: Per = "site"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        return proposed(self.name, "Longformer", self.lines, group, evidence)

    def lines(self, site: Site) -> dict[str, str] | Refusal:
        length = site.size("k")
        wide = [window for window in self.windows if not (isinstance(length, int) and window[1] >= length)]
        found = {f"window {near}, every {step} of {far}": line(near, far, step, back=causal(site)) for near, far, step in wide}
        return found or Refusal(f"the smallest window reaches over all {length} keys", site.name)

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """The group with the new mask in the spec of its site."""
        return applied(candidate, group)


def line(near: int, far: int, step: int, *, back: bool) -> str:
    close, wide = (f"window({w})" if back else f"window({w}) & lookahead({w})" for w in (near, far))
    return f"({close} | {wide} & dilated({step}))"
