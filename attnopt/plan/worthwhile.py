"""Options that cannot save what is to be least are not searched: neither measured nor timed, and what they need is never computed.

int4 group 32 of the layers of an encoder, 128 rows of 384 inputs     ->   refused: predicted to take 1.9 ms where 0.6 ms are taken now

A prediction may be off: only what would take longer with FAR less time than predicted is left out, kind by kind. Options that narrow
tables alone take no time and stay. Where memory is to be least, or every rewrite that holds is wanted, all stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnopt.ir.site import Refusal
from attnopt.plan.options.proposals import Class, Proposal, places
from attnopt.plan.timing.pricing import Prices

FAR = 0.7  # of the predicted time: so much faster a kernel may be than the cost model knows


def worthwhile(classes: Sequence[Class], prices: Prices) -> list[Class]:
    """The classes without options of kinds that cost time; the reason stands among what passes refused."""
    spent: dict[str, tuple[float, float]] = {}
    for _, option in places(classes):
        before, after = prices.predicted(option)
        known = spent.get(option.kind, (0.0, 0.0))
        spent[option.kind] = known[0] + before, known[1] + after
    hopeless = {kind: times for kind, times in spent.items() if times[1] * FAR > times[0] > 0}
    found = []
    for each in classes:
        left = tuple(o for o in each.options if o.kind not in hopeless or all(m.narrows for m in o.moves))
        gone = {o.moves[0].rewrite.name: why(o, *hopeless[o.kind]) for o in each.options if o not in left and len(o.moves) == 1}
        found.append(replace(each, options=left, refusals=(*each.refusals, *gone.items())))
    return found


def why(option: Proposal, before: float, after: float) -> Refusal:
    kind = option.moves[0].candidate.kind or option.description
    return Refusal(f"{kind} everywhere is predicted to take {after * 1e3:.3g} ms where {before * 1e3:.3g} ms are taken now")
