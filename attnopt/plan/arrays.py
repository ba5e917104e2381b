"""Arrays of the size of weights that moves need: computed when a move is first made, and kept for when it is made again.

    gptq of down_proj, without codes   ->   rewrite.arrays(candidate, group, evidence)   ->   the same move with its codes

A search makes each move many times. What was computed stays in memory up to a limit, what was used longest ago is let go first, and on
disk where there is a store of measurements. A plan that was read from a file has its moves without arrays: the same data give the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from attnopt.analysis.evidence import Evidence
from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Computes
from attnopt.plan.options.proposals import Move, described

MEMORY = 1 << 30  # bytes
Held = Mapping[str, Mapping[str, Tensor]]


@dataclass
class Arrays:
    """evidence: what they are computed from; without it moves stay as they are. memory: bytes that are kept at most.

    computed: how many moves something was computed for.
    """

    evidence: Evidence | None = None
    memory: int = MEMORY
    kept: dict[str, Held] = field(default_factory=dict)
    computed: int = 0

    def ready(self, moves: Sequence[Move]) -> tuple[Move, ...]:
        """The moves with all that they need. Raises RuntimeError where something cannot be computed, with the reason."""
        return tuple(map(self.with_arrays, moves))

    def with_arrays(self, move: Move) -> Move:
        needs = move.candidate.nodes and not move.candidate.arrays and isinstance(move.rewrite, Computes)
        if not needs or self.evidence is None or not self.evidence.samples:
            return move
        key = f"{move.rewrite!r} | {described(move)}"
        held = self.kept.pop(key, None) or self.stored(key, move) or self.made(key, move)
        self.kept[key] = held
        while size(self.kept.values()) > self.memory and len(self.kept) > 1:
            del self.kept[next(iter(self.kept))]
        return replace(move, candidate=replace(move.candidate, arrays=held))

    def made(self, key: str, move: Move) -> Held:
        assert self.evidence is not None and isinstance(move.rewrite, Computes)
        found = move.rewrite.arrays(move.candidate, move.group, self.evidence)
        if isinstance(found, Refusal):
            raise RuntimeError(f"'{move.candidate.pass_name}': {found}")
        self.computed += 1
        flat = {f"{i}/{name}": x for i, node in enumerate(names(move)) for name, x in found.get(node, {}).items()}
        self.evidence.store.put(self.evidence.key("arrays", key), flat)
        return found

    def stored(self, key: str, move: Move) -> Held | None:
        """What an earlier search computed. On disk layers go by their place: a name may be no name of a file."""
        assert self.evidence is not None
        flat = self.evidence.store.get(self.evidence.key("arrays", key)) if self.evidence.store.folder is not None else None
        if flat is None:
            return None
        found: dict[str, dict[str, Tensor]] = {}
        for name, x in flat.items():
            at, _, part = name.partition("/")
            found.setdefault(names(move)[int(at)], {})[part] = x
        return found


def names(move: Move) -> list[str]:
    return [n.name for n in move.candidate.nodes]


def size(held: Iterable[Held]) -> int:
    """Bytes."""
    return sum(x.nbytes for each in held for arrays in each.values() for x in arrays.values())
