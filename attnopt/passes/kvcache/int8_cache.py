"""Keep past keys and values as int8, each token of each head with a scale and a zero point of its own.

    present = concat(past [B, H, P, D], new), attention(q, present, …)
        ->   codes = concat(past codes, codes of new), scales and zeros alike; attention(q, (codes + 128 + zeros) * scales, …)

    scale = (max - min) / 255      zero = round(min / scale)      code = round(x / scale) - zero - 128      over the D channels of a row

It is what `cache(k=int8, v=int8)` of a spec means, to the last bit: every token is rounded once, when it comes. A second candidate
spreads the channels of keys first, y = (x - shift) / spread with the middle and half the range that calibration saw (`k_shift`,
`k_spread`): channels that are large by themselves then take no levels from the others.

What a caller passes on changes: int8 codes with scales and zeros where a tensor was. So it is offered only for caches that come and go
as tensors of their own. A row of D channels takes D + 8 bytes.

Source of the static shift and spread: "WKVQuant"; of the quantiser: the one family that all cache methods share.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.caches.plan import applied, balanced, codes
from attnopt.passes.edits.caches.rows import Rows
from attnopt.passes.edits.caches.slots import slots
from attnopt.passes.edits.caches.state import Kept


@dataclass(frozen=True)
class Int8Cache:
    """Keep past keys and values as int8, each token of each head with a scale and a zero point of its own."""

    name: str = "int8-cache"
    exact: bool = False
    per: Per = "model"

    @property
    def rows(self) -> Rows:
        return Rows()

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        held = slots(group)
        if isinstance(held, Refusal):
            return held
        form, values = Kept(self.rows), [s for s in held if s.side == "v"]
        found = [codes(group, self.name, "int8 values", values, form)] if values else []
        found.append(codes(group, self.name, "int8", held, form))
        if balance := balanced(held, evidence):
            found.append(codes(group, self.name, "int8 keys by channel", held, form, balance=balance))
        return found

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it."""
        return applied(candidate, group)
