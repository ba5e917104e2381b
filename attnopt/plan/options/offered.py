"""What passes propose, less what the target has no kernel for.

sage-attention on a100:  int8 scores, fp16 values | int8 scores, fp8 values   ->   int8 scores, fp16 values
                         refused: int8 scores, fp8 values: no kernel computes it: sm_80 does not multiply fp8 (E4M3): …
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnopt.ir.site import Refusal
from attnopt.plan.options.proposals import Class, Proposal
from attnopt.plan.options.workshop import Workshop


def offered(classes: Sequence[Class], shop: Workshop) -> list[Class]:
    """The classes without options for which the target has no kernel; the reason stands among what passes refused."""
    found = []
    for each in classes:
        lacking = {option: reason for option in each.options if (reason := without_kernel(option, shop)) is not None}
        told = {option.moves[0].rewrite.name: reason for option, reason in lacking.items() if len(option.moves) == 1}
        kept = tuple(option for option in each.options if option not in lacking)
        found.append(replace(each, options=kept, refusals=(*each.refusals, *told.items())))
    return found


def without_kernel(option: Proposal, shop: Workshop) -> Refusal | None:
    """Why nothing computes a spec that the option asks for."""
    lacking = ((site, shop.kernel_for(changed)) for site, changed in option.specs())
    why = next(((site, refusal) for site, refusal in lacking if isinstance(refusal, Refusal)), None)
    return (
        None if why is None else Refusal(f"{option.moves[0].candidate.kind}: no kernel computes it: {why[1].reason}", why[0].name)
    )
