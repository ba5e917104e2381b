"""How a search stays within its memory: what one measurement takes, in batches as small as it needs.

    half of what is left >= weights + the largest activations of a batch      ->   batches as they are
    otherwise                                                                  ->   cut in halves until they fit, and a line says so

What does not fit even so is refused where it would be measured (`losses`), and counted where it only would be known better (`search`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from attnopt.analysis.calibration import Calibration
from attnopt.cost.memory import peak_memory
from attnopt.ir.graph import Graph
from attnopt.plan.choose import Chosen
from attnopt.plan.memory import resident
from attnopt.plan.search.effort import Spent

TRIALS = 2  # models that are there at a time: the one that is measured, and one beside it


@dataclass
class Room:
    """What one model, with the kernels that were chosen for its sites, takes of the memory that is left."""

    graph: Graph
    chosen: Sequence[Chosen]
    spent: Spent
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = max(0, self.spent.memory_limit - resident.held()) if self.spent.memory_limit else None

    def share(self, wanted: int) -> int:
        """Bytes for what may be kept or computed again: what is wanted, at most an eighth of what is left."""
        return wanted if self.left is None else min(wanted, self.left // 8)

    def needs(self, data: Calibration) -> float:
        """Bytes that a model takes while it runs on the largest of these batches, weights included."""
        distinct = {tuple(sorted(sizes.items())): sizes for sizes in map(self.graph.sizes, data.batches)}
        return max(map(self.of, distinct.values()))

    def of(self, sizes: Mapping[str, int]) -> float:
        held = [c for c in self.chosen if c.lowering is not None]
        try:
            return peak_memory(self.graph, sizes, [c.site for c in held], [c.lowering.name for c in held if c.lowering])
        except KeyError:  # a length that is only known when the model runs
            return peak_memory(self.graph, sizes)

    def in_pieces(self, data: Calibration) -> Calibration:
        """The data in batches that fit."""
        largest = most = max((data.size(b) for b in data.batches), default=1)
        while self.left is not None and most > 1 and TRIALS * self.needs(data.pieces(most)) > self.left:
            most = (most + 1) // 2
        made = data.pieces(most)
        if made is not data:
            said = (
                f"batches of {largest} samples were cut to {most}: the search may hold {self.spent.memory_limit / 2**30:.3g} GiB"
            )
            self.notes += [said] if said not in self.notes else []
        return made
