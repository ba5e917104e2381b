"""The canonical graph: one small vocabulary in which both hosts show their models, so that a pattern is written once.

A host translates each of its nodes to one or more canonical nodes. A value that exists in the host has a `handle`; a value
that exists only here (the permute inside an einsum) has none, and the host's builder can materialise it. Nodes that
do nothing (identity, contiguous, dropout that is off) do not appear: their outputs are their inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from attnopt.ir.dims import Shape, solved

# name -> inputs and attributes. `opaque` is everything else: it has inputs, outputs and the host's name for it.
LAYOUT = {
    "permute": "(x) perm: tuple[int]",
    "reshape": "(x) the output's shape says how; also unsqueeze, squeeze, flatten, view",
    "expand": "(x) to the output's shape; sizes of 1 repeat, missing leading dimensions are added",
}
ELEMENTWISE = {
    **dict.fromkeys(("add", "sub", "mul", "div", "pow", "floordiv", "mod", "maximum", "minimum"), "(a, b)"),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor"), "(a, b) -> bool"),
    **dict.fromkeys(("neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid", "relu"), "(x)"),
    **dict.fromkeys(("gelu", "silu", "erf", "sin", "cos", "floor", "round", "not", "isnan", "isinf"), "(x)"),
    "where": "(condition, a, b)",
    "cast": "(x) dtype: str",
}
REDUCTION = {
    **{f"reduce_{name}": "(x) axes: tuple[int], keepdims: bool" for name in ("sum", "max", "min", "mean", "any")},
    "cumsum": "(x) axis: int",
    "softmax": "(x) axis: int",
}
CONTRACTION = {
    "matmul": "(a, b) batched over broadcast leading dimensions",
    "linear": "(x, weight [out, in], bias | None)",
}
ACCESS = {
    "slice": "(x) axis: int, start: Dim | None, stop: Dim | None, step: int | None; None where neither a number nor a size",
    "concat": "(x, …) axis: int",
    "gather": "(x, indices) axis: int; also embedding (unsigned=True: no negative indices) and index_select",
    "index": "(x, indices, …) axes: tuple[int]; neighbouring axes, replaced by what the indices broadcast to",
    "topk": "(x) count: int; int64 places of the largest numbers along the last axis, the largest first",
    "iota": "() start: Dim, step: int; values along the only axis",
    "full": "() value: the scalar",
    "triangle": "(x) diagonal: int, upper: bool; others become zero",
    "scatter": "(x, indices [n], updates) axis: int; the rows at these indices along the axis become those of updates",
}
BLOCK = {
    "layer_norm": "(x, weight | None, bias | None) eps: float; over the last axis",
    "rms_norm": "(x, weight | None) eps: float; over the last axis",
    "attention": "(q, k, v, mask | None) causal: bool (top-left aligned), scale: float, softcap: float; q, k, v are [B, H, L, D]"
    " or [H, L, D]; the heads of q are a multiple of those of k and v",
}
OPAQUE = {
    "opaque": "operator: str; reason: str where it is an attention that was not read; bodies: dict[str, Graph] where it runs graphs"
}
VOCABULARY: dict[str, str] = {**LAYOUT, **ELEMENTWISE, **REDUCTION, **CONTRACTION, **ACCESS, **BLOCK, **OPAQUE}


@dataclass(eq=False)
class Value:
    """One tensor. `shape` is None where the rank is unknown; `dtype` is a torch name ("float32"), "" where unknown.

    A value with `sizes` but without producer and handle is just these numbers, to be computed where they are needed.
    """

    name: str
    shape: Shape | None
    dtype: str = ""
    producer: Node | None = None
    users: list[Node] = field(default_factory=list)
    handle: Any = None
    load: Callable[[], Tensor] | None = None  # the data of a constant or parameter, read when asked
    sizes: Shape | None = None  # the elements, where this is a small integer tensor made of sizes

    @property
    def is_constant(self) -> bool:
        return self.load is not None

    def scalar(self) -> bool | int | float | None:
        """The number, where this is a constant of one element (or a full of one number); None otherwise."""
        if self.producer is not None and self.producer.op == "full":
            return self.producer.attrs["value"]  # type: ignore[no-any-return]
        if self.load is None or self.shape is None or any(d != 1 for d in self.shape):
            return None
        return self.load().reshape(()).item()

    def __repr__(self) -> str:
        shape = "?" if self.shape is None else "x".join(map(str, self.shape))
        return f"%{self.name}: {self.dtype}[{shape}]"


@dataclass(frozen=True)
class Source:
    """Where a node comes from: the module path of the model and the line of user code, where the host knows them."""

    module: str = ""
    line: str = ""


@dataclass(eq=False)
class Node:
    """One operation of `VOCABULARY`. `name` is the host's name of the node it came from."""

    op: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    source: Source = Source()

    @property
    def output(self) -> Value:
        return self.outputs[0]

    def __repr__(self) -> str:
        attrs = "".join(f", {k}={v}" for k, v in self.attrs.items() if k != "bodies")
        inputs = ", ".join("none" if i is None else f"%{i.name}" for i in self.inputs)
        return f"{', '.join(map(repr, self.outputs))} = {self.op}({inputs}{attrs})"


@dataclass
class Graph:
    """Nodes in an order in which every value is made before it is used."""

    nodes: list[Node] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)

    def add(
        self,
        op: str,
        inputs: tuple[Value | None, ...],
        outputs: tuple[Value, ...],
        *,
        name: str = "",
        source: Source = Source(),
        **attrs: Any,
    ) -> Node:
        """Append a node and tie its values to it."""
        if op not in VOCABULARY:
            raise ValueError(f"'{op}' is not in the canonical vocabulary")
        node = Node(op, inputs, outputs, attrs, name, source)
        for value in outputs:
            value.producer = node
        for value in dict.fromkeys(i for i in inputs if i is not None):
            value.users.append(node)
        self.nodes.append(node)
        return node

    def of(self, *ops: str) -> Iterator[Node]:
        """The nodes with one of these operations, in order."""
        return (n for n in self.nodes if n.op in ops)

    def sizes(self, inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """The values of the symbolic sizes that the shapes of these named inputs tell."""
        found: dict[str, int] = {}
        for value in self.inputs:
            if value.name in inputs and value.shape is not None:
                for dim, size in zip(value.shape, inputs[value.name].shape, strict=False):
                    if (told := solved(dim, int(size))) is not None:
                        found[told[0]] = told[1]
        return found

    def moved(self, old: Any, new: Any) -> None:
        """Values that the host holds under `old` it now holds under `new`: an edit wrote another node in its place."""
        for node in self.nodes:
            for value in node.outputs:
                if value.handle is old:
                    value.handle = new

    def bodies(self) -> Iterator[tuple[Node, str, Graph]]:
        """What the nodes of this graph run: (node, name of its attribute, graph), in order; not what those run in turn."""
        for node in self.nodes:
            for name, body in node.attrs.get("bodies", {}).items():
                yield node, name, body

    def nested(self) -> Iterator[Graph]:
        """This graph and all that it runs, however deep."""
        yield self
        for _, _, body in self.bodies():
            yield from body.nested()

    def __str__(self) -> str:
        head = f"graph({', '.join(map(repr, self.inputs))})"
        return "\n".join([head, *(f"  {n!r}" for n in self.nodes), f"  return {', '.join(f'%{o.name}' for o in self.outputs)}"])
