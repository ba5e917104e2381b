"""What passes propose, less what the target has no kernel for, and what the form that the user gave the model in cannot hold.

sage-attention on a100:  int8 scores, fp16 values | int8 scores, fp8 values   ->   int8 scores, fp16 values
                         refused: int8 scores, fp8 values: no kernel computes it: sm_80 does not multiply fp8 (E4M3): …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from attnopt.ir.site import Host, Refusal
from attnopt.plan.options.proposals import Class, Move, Proposal, described
from attnopt.plan.options.workshop import Workshop

Takes = Callable[[Host], Refusal | None]


def offered(classes: Sequence[Class], shop: Workshop, takes: Takes | None = None) -> list[Class]:
    """The classes without options that cannot be; the reason stands among what passes refused.

    takes: why a rewritten graph cannot be given back as what it was made of, where that is more than the graph.
    """
    unheld, found = {} if takes is None else not_taken(classes, shop, takes), []
    for each in classes:
        lacking = {option: reason for option in each.options if (reason := without_kernel(option, shop)) is not None}
        lacking |= {option: unheld[described(m)] for option in each.options for m in option.moves if described(m) in unheld}
        told = {option.moves[0].rewrite.name: reason for option, reason in lacking.items() if len(option.moves) == 1}
        kept = tuple(option for option in each.options if option not in lacking)
        found.append(replace(each, options=kept, refusals=(*told.items(), *each.refusals)))
    return found


def not_taken(classes: Sequence[Class], shop: Workshop, takes: Takes) -> dict[str, Refusal]:
    """Moves of another structure that cannot be given back: asked of each kind everywhere, and of each move alone where that is refused."""
    kinds: dict[tuple[str, str], list[Move]] = {}
    for option in (o for each in classes for o in each.options if len(o.moves) == 1):
        (move,) = option.moves
        if "structure" in move.candidate.changes:
            kinds.setdefault((move.rewrite.name, move.candidate.kind), []).append(move)

    def refused(moves: Sequence[Move]) -> Refusal | None:
        try:
            return takes(shop.edited(shop.host.copy(), shop.arrays.ready(moves), {}))
        except RuntimeError as failure:
            return Refusal(str(failure), moves[0].group.name)

    found: dict[str, Refusal] = {}
    for moves in kinds.values():
        if (everywhere := refused(moves)) is None:
            continue
        alone = {described(m): refused([m]) for m in moves} if len(moves) > 1 else {described(moves[0]): everywhere}
        found |= {move: why for move, why in alone.items() if why is not None} or {described(m): everywhere for m in moves}
    return found


def without_kernel(option: Proposal, shop: Workshop) -> Refusal | None:
    """Why nothing computes a spec that the option asks for."""
    lacking = ((site, shop.kernel_for(changed)) for site, changed in option.specs())
    why = next(((site, refusal) for site, refusal in lacking if isinstance(refusal, Refusal)), None)
    return (
        None if why is None else Refusal(f"{option.moves[0].candidate.kind}: no kernel computes it: {why[1].reason}", why[0].name)
    )
