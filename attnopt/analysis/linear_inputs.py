"""What the linear layers of a graph read: the layers, and the measures of their inputs.

linear(x, weight [out, in])  or  matmul(x, weight [in, out])   ->   x, one row of `in` channels for each token that is no padding
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from attnopt.analysis.calibration import Batch
from attnopt.analysis.padding import Padding, real
from attnopt.analysis.running import RunningChannels, RunningMoment
from attnopt.analysis.statistics import parts
from attnopt.ir.graph import Graph, Node, Value


@dataclass
class ChannelMeasure:
    """Channel statistics of one value [..., C]."""

    key: str
    value: Value
    padding: Padding
    running: RunningChannels

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.value,)

    @property
    def size(self) -> int:
        return sum(x.nbytes for x in self.running.state.values())

    def add(self, data: Mapping[Value, Tensor], inputs: Batch) -> None:
        tensor = data[self.value]
        self.running.add(real(tensor, self.padding.leading(self.value.shape, tensor, inputs)))

    def state(self) -> dict[str, Tensor]:
        return self.running.state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.running.state = dict(state)

    def result(self) -> dict[str, Tensor]:
        return parts(self.running.value())


@dataclass
class MomentMeasure:
    """The second moment of one value [..., C]. `running` is made when it is first added to: all layers at once may not fit."""

    key: str
    value: Value
    width: int
    padding: Padding
    running: RunningMoment | None = None

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.value,)

    @property
    def size(self) -> int:
        return 8 * self.width**2

    def add(self, data: Mapping[Value, Tensor], inputs: Batch) -> None:
        self.running = self.running or RunningMoment(self.width)
        tensor = data[self.value]
        self.running.add(real(tensor, self.padding.leading(self.value.shape, tensor, inputs)))

    def state(self) -> dict[str, Tensor]:
        return (self.running or RunningMoment(self.width)).state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.running = RunningMoment(self.width)
        self.running.state = dict(state)

    def result(self) -> dict[str, Tensor]:
        return {"moment": (self.running or RunningMoment(self.width)).value()}


def input_width(node: Node) -> int | None:
    """Channels of what a linear layer reads; None where the node is none, or has no constant weight of two dimensions."""
    if node.op not in ("linear", "matmul") or len(node.inputs) < 2:
        return None
    data, weight = node.inputs[:2]
    if data is None or weight is None or data.is_constant or not weight.is_constant or len(weight.shape or ()) != 2:
        return None
    size = (weight.shape or ())[1 if node.op == "linear" else 0]
    return size if isinstance(size, int) else None


def linear_inputs(graph: Graph) -> dict[Value, int]:
    """What the linear layers of a graph read, each value once and in order, with its width."""
    found: dict[Value, int] = {}
    for node in graph.nodes:
        if (width := input_width(node)) is not None and node.inputs[0] is not None:
            found.setdefault(node.inputs[0], width)
    return found
