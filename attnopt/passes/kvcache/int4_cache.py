"""Keep past keys and values as int4, two codes in a byte, each group of channels of a token with a scale and a zero point of its own.

    present = concat(past [B, H, P, D], new)   ->   bytes [B, H, P, D / 2], scales and zeros [B, H, P, D / group] in float16

    scale = (max - min) / 15      zero = round(min / scale)      code = round(x / scale) - zero       over `group` channels of a token

What `cache(k=int4, v=int4, group=32, scales=fp16)` of a spec means. A second candidate spreads the channels of keys first by what
calibration saw, y = (x - shift) / spread: a few channels of keys are large for every token, and a scale by token alone spends its
levels on them. With a static spread by channel and a scale by token both are served, and every token is still rounded when it comes.

Source: "WKVQuant" (static channels, then groups of channels of a token, 4 bits).
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
class Int4Cache:
    """Keep past keys and values as int4, each group of channels of a token with a scale and a zero point of its own.

    group: channels that share a scale; rows that are no longer have one.
    """

    name: str = "int4-cache"
    exact: bool = False
    per: Per = "model"
    group: int = 32

    @property
    def rows(self) -> Rows:
        return Rows(bits=4, group=self.group, scales="fp16")

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        held, form = slots(group), Kept(self.rows)
        if isinstance(held, Refusal):
            return held
        if (refusal := unfit(held, form)) is not None:
            return refusal
        values = [s for s in held if s.side == "v"]
        found = [codes(group, self.name, "int4 values", values, form)] if values else []
        found.append(codes(group, self.name, "int4", held, form))
        if balance := balanced(held, evidence):
            found.append(codes(group, self.name, "int4 keys by channel", held, form, balance=balance, source="WKVQuant"))
        return found

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it."""
        return applied(candidate, group)
