"""Sinks plus window, with what they lose on every 64th row given back to the rows after it.

    softmax scale(s) causal   ->   softmax scale(s) causal & (window(256) | global(16)) delta(64, dense=causal)

    o[i + u] = o_s[i + u] + o_d[i] - o_s[i],  0 <= u < 64     o_s sparse, o_d dense, i a multiple of 64; the last rows are dense

It costs 1/64 of dense attention more, and gives back what neighbouring rows lose alike. On real activations they do; on independent
random queries and keys the losses of neighbours have nothing in common, and the correction does not help: do not judge it there.

Source: "Delta Attention".
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.sparsity import applied, causal, proposed


@dataclass(frozen=True)
class DeltaAttention:
    """Sinks plus window, with what they lose on every 64th row given back to the rows after it.

    gamma: every so many rows are dense. bases: (sinks, window); the source has 1024 and 2048.
    """

    gamma: int = 64
    bases: tuple[tuple[int, int], ...] = ((1024, 2048), (16, 256))
    name: str = "delta-attention"
    exact: bool = False
    per: Per = "site"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        return proposed(self.name, "Delta Attention", self.lines, group, evidence)

    def lines(self, site: Site) -> dict[str, str] | Refusal:
        if not causal(site):
            return Refusal("the difference is carried forward: it needs a causal mask", site.name)
        length = site.size("k")
        wide = [(s, w) for s, w in self.bases if not (isinstance(length, int) and s + w >= length)]
        found = {
            f"{s} sinks and window {w}": f"(window({w}) | global({s})) delta({self.gamma}, dense={site.spec.mask})"
            for s, w in wide
        }
        return found or Refusal(f"the smallest window covers all {length} keys", site.name)

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """The group with mask and correction in the spec of its site."""
        return applied(candidate, group)
