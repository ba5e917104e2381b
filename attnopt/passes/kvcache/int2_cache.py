"""Keep past keys and values in 2 bits, four codes in a byte, each group of channels of a token with a scale and a zero point.

    present = concat(past [B, H, P, D], new)   ->   bytes [B, H, P, D / 4], scales and zeros [B, H, P, D / group] in float16

    scale = (max - min) / 3      zero = round(min / scale)      code = round(x / scale) - zero       over `group` channels of a token

What `cache(k=int2, v=int2, group=32, scales=fp16)` of a spec means: plain rounding to the nearest of four levels, the baseline of the
methods for 2 bits. A second candidate spreads the channels of keys first by what calibration saw.

Source of the static shift and spread: "WKVQuant"; of the quantiser: the one family that all cache methods share.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.caches.plan import applied, balanced, codes, unfit
from attnopt.passes.edits.caches.rows import Rows
from attnopt.passes.edits.caches.slots import slots
from attnopt.passes.edits.caches.state import Kept


@dataclass(frozen=True)
class Int2Cache:
    """Keep past keys and values in 2 bits, each group of channels of a token with a scale and a zero point.

    group: channels that share a scale; rows that are no longer have one.
    """

    name: str = "int2-cache"
    exact: bool = False
    per: Per = "model"
    group: int = 32

    @property
    def rows(self) -> Rows:
        return Rows(bits=2, group=self.group, scales="fp16")

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        held, form = slots(group), Kept(self.rows)
        if isinstance(held, Refusal):
            return held
        if (refusal := unfit(held, form)) is not None:
            return refusal
        found = [codes(group, self.name, "2-bit", held, form)]
        if balance := balanced(held, evidence):
            found.append(codes(group, self.name, "2-bit keys by channel", held, form, balance=balance))
        return found

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it."""
        return applied(candidate, group)
