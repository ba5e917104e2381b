"""The record of `inspect`: the attentions of a model with their specs, shapes and costs, and the near misses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnopt.ir.block import Block
from attnopt.ir.site import Refusal, Site
from attnopt.report.blocks import block_json
from attnopt.report.data import refusal_json


@dataclass(frozen=True)
class InspectedSite:
    """A site with the block around it, and its cost at the example shapes (FLOPs, bytes), where there are any."""

    site: Site
    flops: float | None = None
    bytes: float | None = None
    block: Block = Block()

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def spec(self) -> str:
        return str(self.site.spec)

    @property
    def steps(self) -> tuple[str, ...]:
        return self.site.steps

    @property
    def source(self) -> str:
        return self.site.source.module or (self.site.nodes[-1].name if self.site.nodes else "")

    @property
    def line(self) -> str:
        return self.site.source.line

    @property
    def shape(self) -> str:
        """b x h/g x q x k x d, with the symbols of the graph."""
        size = {axis: str(dim) for axis, dim in self.site.shape.items()}
        heads = size["h"] if size["h"] == size["g"] else f"{size['h']}/{size['g']}"
        width = size["d"] if size["d"] == size["e"] else f"{size['d']}/{size['e']}"
        return f"[{size['b']}, {heads}, {size['q']} x {size['k']}, {width}]"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "spec": self.spec,
            "steps": list(self.steps),
            "source": self.source,
            "line": self.line,
            "shape": {axis: str(dim) for axis, dim in self.site.shape.items()},
            "flops": self.flops,
            "bytes": self.bytes,
            "block": block_json(self.block),
        }


@dataclass(frozen=True)
class Inspection:
    """What `attnopt.inspect` returns. Printing it shows the table; `explain` adds the blocks and the near misses."""

    sites: tuple[InspectedSite, ...]
    refusals: tuple[Refusal, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"sites": [s.to_json() for s in self.sites], "refusals": [refusal_json(r) for r in self.refusals]}

    def __str__(self) -> str:
        from attnopt.report.table import as_text

        return as_text(self)

    def __rich__(self) -> Any:
        from attnopt.report.table import inspection_table

        return inspection_table(self)

    def explain(self) -> Any:
        """What stands around each attention, then the refusals: reason, node, line of the model."""
        from attnopt.report.table import explanation

        return explanation(self)
