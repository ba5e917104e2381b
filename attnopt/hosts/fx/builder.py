"""Writes canonical operations as ATen nodes into an FX graph, just before a given node.

    emit("permute", x, perm=(0, 2, 1, 3))   ->   %permute = aten.permute(x, [0, 2, 1, 3])

Every new node gets its fake value, so that the graph can be read again afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from attnopt.hosts.fx.flat import unused_attribute
from attnopt.hosts.fx.symbols import Symbols
from attnopt.ir.dims import Dim, Shape, Symbol, parts
from attnopt.ir.graph import Value

aten = torch.ops.aten
NAMED: dict[str, Any] = {
    "add": aten.add.Tensor, "sub": aten.sub.Tensor, "mul": aten.mul.Tensor, "div": aten.div.Tensor, "pow": aten.pow.Tensor_Tensor,
    "floordiv": aten.floor_divide.default, "mod": aten.remainder.Tensor,
    "maximum": aten.maximum.default, "minimum": aten.minimum.default,
    **{name: getattr(aten, name).Tensor for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "and": aten.logical_and.default, "or": aten.logical_or.default, "xor": aten.logical_xor.default, "not": aten.logical_not.default,
    **{name: getattr(aten, name).default for name in (
        "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid", "relu", "gelu", "silu", "erf", "sin", "cos",
        "floor", "round", "isnan", "isinf",
    )},
    "where": aten.where.self, "matmul": aten.matmul.default, "linear": aten.linear.default,
}  # fmt: skip


@dataclass
class FxBuilder:
    """Inserts before `before`. One builder writes one replacement; sizes are read once and shared.

    `written` says which new value first has a size that the model had not: how many chunks a length makes. `made` holds what was
    only in the canonical graph.
    """

    module: fx.GraphModule
    symbols: Symbols
    before: fx.Node
    sizes: dict[Dim, fx.Node] = field(default_factory=dict)
    written: dict[Dim, tuple[fx.Node, int]] = field(default_factory=dict)
    made: dict[Value, Value] = field(default_factory=dict)

    def emit(self, op: str, *inputs: Value | None, shape: Shape, dtype: str = "", **attrs: Any) -> Value:
        handles = [None if i is None else self.handle(i) for i in inputs]
        writer = WRITERS.get(op)
        if writer is not None:
            target, args, kwargs = writer(self, handles, shape, dtype, attrs)
        elif op in NAMED:
            target, args, kwargs = NAMED[op], tuple(handles), {}
        else:
            raise NotImplementedError(f"the torch host writes no '{op}'")
        return self.add(target, args, kwargs, shape, dtype)

    def call(self, target: Any, *inputs: Any, shape: Shape, dtype: str = "", **attrs: Any) -> Value:
        def read(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return [read(y) for y in x]
            return self.handle(x) if isinstance(x, Value) else x

        return self.add(target, tuple(read(i) for i in inputs), attrs, shape, dtype)

    def constant(self, data: Tensor | float | int | bool, dtype: str) -> Value:
        tensor = torch.as_tensor(data).to(device=self.device, dtype=getattr(torch, dtype))
        name = unused_attribute(self.module, "_attnopt_constant")
        self.module.register_buffer(name, tensor)
        with self.module.graph.inserting_before(self.before):
            node = self.module.graph.get_attr(name)
        node.meta["val"] = self.fake(tensor)
        return Value(node.name, tuple(tensor.shape), dtype, handle=node, load=lambda: tensor)

    # Below: handles, sizes, fake values.

    @property
    def device(self) -> torch.device:
        """Where the replaced value is: there new tensors are made."""
        value = self.before.meta.get("val")
        return value.device if isinstance(value, Tensor) else torch.device("cpu")

    def placed(self, dtype: str) -> dict[str, Any]:
        """Type and place of a tensor that is made from numbers."""
        place = {} if self.device.type == "cpu" else {"device": self.device}
        return {"dtype": torch_dtype(dtype), **place}

    def handle(self, value: Value) -> fx.Node:
        """The FX node of a value; one that exists only in the canonical graph is written now."""
        if value.handle is None:
            if value.producer is None:  # a number
                data = value.load() if value.load is not None else None
                if data is None:
                    raise NotImplementedError(f"{value!r} has no node to read")
                value.handle = self.constant(data, value.dtype).handle
            else:
                node = value.producer
                if value not in self.made:
                    self.made[value] = self.emit(node.op, *node.inputs, shape=value.shape or (), dtype=value.dtype, **node.attrs)
                return self.made[value].handle  # type: ignore[no-any-return]
        return value.handle  # type: ignore[no-any-return]

    def add(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shape: Shape, dtype: str) -> Value:
        with self.module.graph.inserting_before(self.before):
            node = self.module.graph.call_function(target, args, kwargs)
        node.meta["val"] = made = self.evaluate(target, args, kwargs)
        for key in ("nn_module_stack", "stack_trace"):
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]
        known = dtype or str(made.dtype).removeprefix("torch.")
        for axis, dim in enumerate(shape):
            if isinstance(dim, Symbol):
                self.written.setdefault(dim, (node, axis))
        return Value(node.name, shape, known, handle=node)

    def evaluate(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def value(node: fx.Node) -> Any:
            return node.meta["val"]

        mode = self.mode()
        values, keywords = fx.node.map_arg(args, value), fx.node.map_arg(kwargs, value)
        with mode if mode is not None else torch.no_grad():
            try:
                return target(*values, **keywords)
            except RuntimeError:  # sizes such as Max(0, 64 - s) that the tracer cannot prove equal to those that are wanted
                if target is not torch.ops.aten.reshape.default:
                    raise
                return values[0].new_empty(values[1])

    def mode(self) -> Any:
        """Of the fake values of the graph, which all have one; None where values are real. The first tells: this is asked for each node."""
        values = (n.meta.get("val") for n in self.module.graph.nodes)
        return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)

    def fake(self, tensor: Tensor) -> Tensor:
        mode = self.mode()
        return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)

    def shape(self, shape: Shape, *, keep: Shape | None = None) -> list[Any]:
        """Sizes as arguments: numbers, -1 for the only unknown one, else nodes that read them when the model runs."""
        unknown = [d for d in shape if isinstance(d, Symbol)]
        if keep is None and len(unknown) == 1:
            return [-1 if isinstance(d, Symbol) else d for d in shape]
        return [self.size(d) if isinstance(d, Symbol) else d for d in shape]

    def size(self, dim: Dim) -> Any:
        """A node that holds the size: read from the first value that has it, products multiplied."""
        if isinstance(dim, int):
            return dim
        if dim not in self.sizes:
            found = self.read_size(dim)
            if found is None and dim in self.written:
                found = self.compute(aten.sym_size.int, *self.written[dim])
            if found is None:
                coefficient, names = parts(dim)
                if len(names) == 1 and coefficient == 1:
                    raise NotImplementedError(f"no value has a dimension of size {dim}")
                found = self.times([self.size(Symbol(1, (n,))) for n in names], coefficient)
            self.sizes[dim] = found
        return self.sizes[dim]

    def read_size(self, dim: Dim) -> fx.Node | None:
        for node in self.module.graph.nodes:
            if node is self.before:
                return None
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                for axis, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt) and self.symbols.dim(size) == dim:
                        return self.compute(aten.sym_size.int, node, axis)
            elif isinstance(value, torch.SymInt) and self.symbols.dim(value) == dim:
                return node  # type: ignore[no-any-return]
        return None

    def times(self, factors: list[Any], coefficient: int) -> fx.Node:
        result = factors[0]
        for factor in [*factors[1:], *([coefficient] if coefficient != 1 else [])]:
            result = self.compute(operator.mul, result, factor)
        return result  # type: ignore[no-any-return]

    def compute(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        with self.module.graph.inserting_before(self.before):
            node = self.module.graph.call_function(target, args)
        values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
        node.meta["val"] = values[0].shape[values[1]] if target is aten.sym_size.int else target(*values)
        return node


Written = tuple[Any, tuple[Any, ...], dict[str, Any]]


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)  # type: ignore[no-any-return]


def write_reshape(b: FxBuilder, x: list[Any], shape: Shape, dtype: str, attrs: dict[str, Any]) -> Written:
    return aten.reshape.default, (x[0], b.shape(shape)), {}


def write_expand(b: FxBuilder, x: list[Any], shape: Shape, dtype: str, attrs: dict[str, Any]) -> Written:
    given = b.symbols.shape(x[0].meta["val"])
    lead = len(shape) - len(given)
    sizes = [-1 if i >= lead and given[i - lead] == d else b.size(d) for i, d in enumerate(shape)]
    return aten.expand.default, (x[0], sizes), {}


def write_permute(b: FxBuilder, x: list[Any], shape: Shape, dtype: str, attrs: dict[str, Any]) -> Written:
    return aten.permute.default, (x[0], list(attrs["perm"])), {}


def write_cast(b: FxBuilder, x: list[Any], shape: Shape, dtype: str, attrs: dict[str, Any]) -> Written:
    return aten.to.dtype, (x[0], torch_dtype(dtype)), {}


def write_reduction(name: str) -> Callable[..., Written]:
    def write(b: FxBuilder, x: list[Any], shape: Shape, dtype: str, attrs: dict[str, Any]) -> Written:
        target = {
            "reduce_sum": aten.sum.dim_IntList, "reduce_mean": aten.mean.dim, "reduce_max": aten.amax.default,
            "reduce_min": aten.amin.default, "reduce_any": aten.any.dims,
        }[name]  # fmt: skip
        return target, (x[0], list(attrs["axes"]), attrs["keepdims"]), {}

    return write


def write_softmax(b: FxBuilder, x: list[Any], shape: Shape, dtype: str, attrs: dict[str, Any]) -> Written:
    return aten.softmax.int, (x[0], attrs["axis"]), {}


def write_slice(b: FxBuilder, x: list[Any], shape: Shape, dtype: str, attrs: dict[str, Any]) -> Written:
    if attrs["start"] is None or attrs["step"] is None:
        raise NotImplementedError("a slice whose bounds are computed")
    stop = None if attrs["stop"] is None else b.size(attrs["stop"])
    return aten.slice.Tensor, (x[0], attrs["axis"], b.size(attrs["start"]), stop, attrs["step"]), {}


def write_concat(b: FxBuilder, x: list[Any], shape: Shape, dtype: str, attrs: dict[str, Any]) -> Written:
    return aten.cat.default, (x, attrs["axis"]), {}


def write_gather(b: FxBuilder, x: list[Any], shape: Shape, dtype: str, attrs: dict[str, Any]) -> Written:
    return aten.index.Tensor, (x[0], [*([None] * attrs["axis"]), x[1]]), {}


def write_index(b: FxBuilder, x: list[Any], shape: Shape, dtype: str, attrs: dict[str, Any]) -> Written:
    return aten.index.Tensor, (x[0], [*([None] * attrs["axes"][0]), *x[1:]]), {}


def write_topk(b: FxBuilder, x: list[Any], shape: Shape, dtype: str, attrs: dict[str, Any]) -> Written:
    return operator.getitem, (b.compute(aten.topk.default, x[0], attrs["count"]), 1), {}


def write_iota(b: FxBuilder, x: list[Any], shape: Shape, dtype: str, attrs: dict[str, Any]) -> Written:
    start, step = attrs.get("start", 0), attrs.get("step", 1)
    length, start = b.size(shape[0]), b.size(start) if isinstance(start, Symbol) else start
    if (start, step) == (0, 1):
        return aten.arange.default, (length,), b.placed(dtype or "int64")
    if isinstance(length, int) and not isinstance(start, fx.Node):
        return aten.arange.start_step, (start, start + step * length, step), b.placed(dtype or "int64")
    raise NotImplementedError("an arange of unknown length that does not count from 0")


def write_full(b: FxBuilder, x: list[Any], shape: Shape, dtype: str, attrs: dict[str, Any]) -> Written:
    return aten.full.default, ([b.size(d) for d in shape], attrs["value"]), b.placed(dtype)


def write_triangle(b: FxBuilder, x: list[Any], shape: Shape, dtype: str, attrs: dict[str, Any]) -> Written:
    return (aten.triu if attrs["upper"] else aten.tril).default, (x[0], attrs["diagonal"]), {}


def write_rms_norm(b: FxBuilder, x: list[Any], shape: Shape, dtype: str, attrs: dict[str, Any]) -> Written:
    return aten.rms_norm.default, (x[0], [shape[-1]], x[1] if len(x) > 1 else None, attrs["eps"]), {}


WRITERS: dict[str, Callable[..., Written]] = {
    "rms_norm": write_rms_norm,
    "reshape": write_reshape,
    "expand": write_expand,
    "permute": write_permute,
    "cast": write_cast,
    **{name: write_reduction(name) for name in ("reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_any")},
    "softmax": write_softmax,
    "slice": write_slice,
    "concat": write_concat,
    "gather": write_gather,
    "index": write_index,
    "topk": write_topk,
    "iota": write_iota,
    "full": write_full,
    "triangle": write_triangle,
}
