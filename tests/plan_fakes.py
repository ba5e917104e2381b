"""Lowerings, passes and a clock that do as they are told, for tests of how the planner decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from attnopt.codegen.library.multi_head_attention import MultiHeadAttention
from attnopt.ir.graph import Value
from attnopt.ir.site import Builder, Refusal, Site
from attnopt.passes import Candidate, Evidence, Group
from attnopt.passes.candidate import Per
from attnopt.plan.timing.timing import Timing


@dataclass(frozen=True)
class Kernel:
    """MultiHeadAttention under another name. It refuses with a reason, breaks, or computes `factor` times what it should."""

    name: str
    reason: str = ""
    broken: str = ""
    factor: float = 1.0
    host: str = "onnx"
    opset: int = 13

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        return Refusal(self.reason, site.name) if self.reason else None

    def emit(self, site: Site, builder: Builder) -> Value:
        if self.broken:
            raise RuntimeError(self.broken)
        made = MultiHeadAttention().emit(site, builder)
        if self.factor == 1.0:
            return made
        return builder.emit("mul", made, builder.constant(self.factor, made.dtype), shape=made.shape or (), dtype=made.dtype)


@dataclass(frozen=True)
class Off:
    """An approximate pass that makes the first output off by a share of itself: the relative error is that share."""

    shares: tuple[float, ...]
    name: str = "off"
    exact: bool = False
    per: Per = "model"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        found = [
            Candidate(self.name, False, f"off by {x}", options={"share": x}, kind=f"off {x}", changes=("structure",))
            for x in self.shares
        ]
        return found or Refusal("nothing to be off")

    def apply(self, candidate: Candidate, group: Group) -> Group:
        output = group.host.graph.outputs[0]
        assert output.producer is not None
        builder = group.host.builder(output.producer)
        factor = builder.constant(1.0 + float(candidate.options["share"]), output.dtype)  # type: ignore[arg-type]
        copy = builder.emit(output.producer.op, *output.producer.inputs, shape=output.shape or (), **output.producer.attrs)
        group.host.replace(output, builder.emit("mul", copy, factor, shape=output.shape or (), dtype=output.dtype))
        return group


def clock(seconds: Mapping[str, float], asked: list[list[str]] | None = None) -> Callable[..., dict[str, Timing]]:
    """In place of `in_turn`: every callable runs once and takes the seconds given for it, 1 where none are."""

    def in_turn(calls: Mapping[str, Callable[[], object]], **_: float) -> dict[str, Timing]:
        for call in calls.values():
            call()
        if asked is not None:
            asked.append(list(calls))
        return {name: Timing((seconds.get(name, 1.0),) * 3) for name in calls}

    return in_turn
