"""Keep tables that rows are looked up in, embeddings above all, in few bits, each number rounded to the nearest level.

    y = table[ids]   ->   y = ((codes - zeros) * steps)[ids]          a step for every `group` channels of a row, or for all of it

Nothing is computed faster by it: a table is the larger half of a small model's file. A table that a linear layer reads too (a tied head)
is left alone: it is read from the codes of the layer, where that is kept in codes (`passes.tied_tables`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnopt.ir.graph import Graph, Node
from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.weight_rounding import Wish
from attnopt.rounding.grids import Gridding
from attnopt.rounding.rounded_weight import unfit
from attnopt.rounding.weight_format import WeightFormat


@dataclass(frozen=True)
class RoundTables:
    """Keep tables that rows are looked up in, embeddings above all, in few bits, each number rounded to the nearest level."""

    name: str = "round-tables"
    exact: bool = False
    per: Per = "model"
    smallest: int = 64  # rows and channels
    wishes: tuple[Wish, ...] = (Wish(8, 0), Wish(4, 32, True))  # a step for each row loses 2e-5 at 8 bits
    gridding: Gridding = Gridding("squares")

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        refusal = Refusal(f"no table of at least {self.smallest} rows and channels that only look-ups read", group.name)
        made = []
        for wish in self.wishes:
            kept: dict[str, str] = {}
            nodes = []
            for node in tables(group.host.graph, self.smallest):
                table = node.inputs[0]
                assert table is not None and table.load is not None and table.shape is not None
                format = wish.format(int(table.shape[1]))  # type: ignore[arg-type]
                if format is None:
                    refusal = wish.refusal(int(table.shape[1]), "channels", node)  # type: ignore[arg-type]
                elif (why := unfit(table.load(), format, node.name)) is not None:
                    refusal = why
                else:
                    kept[node.name] = str(format)
                    nodes.append(node)
            if nodes:
                said = " and ".join(dict.fromkeys(kept.values()))
                made.append(
                    Candidate(
                        self.name,
                        False,
                        f"{len(nodes)} tables as {said}, rounded to the nearest",
                        "rounding to nearest",
                        tuple(nodes),
                        {"formats": kept},
                        said,
                        changes=("weights",),
                        storage=kept,
                    )
                )
        return made or refusal

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Changes the host of the group in place; give it a copy."""
        made = {}
        for node in tables(group.host.graph, self.smallest):
            if node.name in candidate.options["formats"]:
                format, table = WeightFormat.read(candidate.options["formats"][node.name]), node.inputs[0]
                assert format is not None and table is not None and table.load is not None
                made[node.name] = self.gridding.rounded(table.load(), format)
        group.host.store_rounded(made)
        return group


def tables(graph: Graph, smallest: int) -> Iterator[Node]:
    """Look-ups of rows of constant float32 matrices that nothing but look-ups reads."""
    for node in graph.of("gather"):
        table = node.inputs[0]
        if table is None or node.attrs["axis"] != 0 or not table.is_constant or table.handle is None or table.dtype != "float32":
            continue
        large = len(table.shape or ()) == 2 and all(isinstance(d, int) and d >= smallest for d in table.shape or ())
        if large and all(user.op == "gather" and user.inputs[0] is table for user in table.users):
            yield node
