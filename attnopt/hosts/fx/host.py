"""The torch host: one traced model, shown as a canonical graph, edited, run, tapped and exported."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.errors import InputMismatch, UnsupportedFormat
from attnopt.hosts.adapting import Remake, adapted
from attnopt.hosts.fx import interface
from attnopt.hosts.fx.builder import FxBuilder
from attnopt.hosts.fx.call import Convention, as_call, split
from attnopt.hosts.fx.capture import Captured
from attnopt.hosts.fx.dropping import drop, leaves_of, let_go, split_placeholder, unreadable, unvarying
from attnopt.hosts.fx.flat import flat_module, has_effect
from attnopt.hosts.fx.int8 import look_up, quantize_linear
from attnopt.hosts.fx.program import limits, read_with_metadata, save_program, to_onnx
from attnopt.hosts.fx.region import isolate
from attnopt.hosts.fx.rounded_weights import store_rounded, store_table, stored_codes
from attnopt.hosts.fx.state import in_place, with_own_state, without_writes, written
from attnopt.hosts.fx.symbols import name_symbols
from attnopt.hosts.fx.translate import translate
from attnopt.hosts.fx.trees import told
from attnopt.ir.dims import Shape
from attnopt.ir.graph import Graph, Node, Value
from attnopt.ir.site import Refusal, Site
from attnopt.rounding.rounded_weight import RoundedWeight
from attnopt.rounding.weight_format import WeightFormat


@dataclass(frozen=True)
class InputSpec:
    """One tensor that the model reads; symbolic sizes are None.

    limits: smallest and largest size that the trace holds for. names: of the sizes; those of one name must be equal.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    limits: tuple[tuple[int | None, int | None], ...] = ()
    names: tuple[str, ...] = ()


@dataclass
class FxHost:
    """A flat GraphModule with its calling convention.

    dropped: placeholders that go at `finish`; gone: names of those that went, which may still be given. remade: inputs that are part of
    what one was.
    """

    module: fx.GraphModule
    captured: Captured
    edited: bool = False
    dropped: tuple[fx.Node, ...] = ()
    remade: dict[str, tuple[str, Remake, int]] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    kind: str = "torch"
    _graph: Graph | None = field(default=None, repr=False)

    @classmethod
    def from_captured(cls, captured: Captured) -> FxHost:
        with told(captured.convention.caches):
            return cls(flat_module(captured.program), captured)

    @property
    def convention(self) -> Convention:
        return self.captured.convention

    @property
    def graph(self) -> Graph:
        """The canonical graph of the module as it is now; read again after `finish`."""
        if self._graph is None:
            self._graph = translate(self.module)
        return self._graph

    def copy(self) -> FxHost:
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.module.graph, {}))
        return FxHost(fx.GraphModule(self.module, graph), self.captured, self.edited, remade=dict(self.remade), gone=self.gone)

    # Editing.

    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.module.graph.nodes if n.op == "placeholder"]

    def node(self, name: str) -> fx.Node:
        return next(n for n in self.module.graph.nodes if n.name == name)

    def builder(self, before: Node) -> FxBuilder:
        return FxBuilder(self.module, name_symbols(self.placeholders()), self.node(before.name))

    def replace(self, old: Value, new: Value) -> None:
        old.handle.replace_all_uses_with(new.handle, delete_user_cb=lambda user: user is not new.handle)

    def finish(self) -> None:
        for node in self.module.graph.nodes:  # a view holds for the strides that the model had before
            if node.target is torch.ops.aten.view.default and not node.kwargs:
                node.target = torch.ops.aten.reshape.default
        self.module.graph.eliminate_dead_code(has_effect)
        let_go(self.module, self.dropped)
        self.module.graph.lint()
        self.module.recompile()
        self.gone |= {node.name for node in self.dropped}
        self.edited, self.dropped = True, ()
        self._graph = None

    def refuses_change(
        self, changes: Collection[str], sites: Collection[Site], shapes: Mapping[str, Mapping[str, int]]
    ) -> Refusal | None:
        return None

    def caches(self, site: Site) -> bool:
        return False  # a graph shows its caches

    def refuses_drop(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> Refusal | None:
        nodes = [v.handle for v in inputs]
        taken, given = leaves_of(self, nodes, outputs)
        counts = dict.fromkeys(given, 0)
        refusal = interface.refusal(self.captured, dict.fromkeys(taken, interface.nothing), counts)
        return refusal or unreadable([n for n in self.placeholders() if n not in self.dropped], nodes)

    def drop(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> None:
        nodes = [v.handle for v in inputs]
        taken, given = leaves_of(self, nodes, outputs)
        self.captured = interface.changed(self.captured, dict.fromkeys(taken, interface.nothing), dict.fromkeys(given, 0))
        self.dropped = (*self.dropped, *drop(self.module, nodes, given))
        self.graph.outputs = [v for v in self.graph.outputs if not any(v is gone for gone in outputs)]

    def refuses_split(
        self, inputs: Sequence[Value], outputs: Sequence[Value], parts: Sequence[Sequence[tuple[str, Shape, str]]] = ()
    ) -> Refusal | None:
        taken, given = leaves_of(self, [v.handle for v in inputs], outputs)
        remake = dict.fromkeys(taken, lambda leaf: [leaf, leaf])
        found = interface.refusal(self.captured, remake, dict.fromkeys(given, 2))
        fixed = (unvarying(self.placeholders(), value.handle, some) for value, some in zip(inputs, parts, strict=False))
        return found or next((refusal for refusal in fixed if refusal is not None), None)

    def split_input(self, value: Value, parts: Sequence[tuple[str, Shape, str]], made: Remake) -> list[Value]:
        taken, _ = leaves_of(self, [value.handle], ())
        nodes = split_placeholder(self.module, value.handle, parts)
        self.captured = interface.changed(self.captured, dict.fromkeys(taken, made), {})
        self.remade |= {n.name: (value.name, made, i) for i, n in enumerate(nodes)}
        self.dropped = (*self.dropped, value.handle)
        return [Value(n.name, shape, dtype, handle=n) for n, (_, shape, dtype) in zip(nodes, parts, strict=True)]

    def split_outputs(self, parts: Mapping[Value, Sequence[tuple[str, Value]]]) -> None:
        where = {i: [v.handle for _, v in made] for value, made in parts.items() for i in leaves_of(self, (), [value])[1]}
        end = next(n for n in self.module.graph.nodes if n.op == "output")
        end.args = (tuple(x for i, leaf in enumerate(end.args[0]) for x in where.get(i, [leaf])),)
        self.captured = interface.changed(self.captured, {}, {i: len(made) for i, made in where.items()})
        self.graph.outputs = [x for v in self.graph.outputs for x in ([part for _, part in parts[v]] if v in parts else [v])]

    def adapt(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return adapted([n.name for n in self.placeholders()], inputs, {}, self.remade)

    def set_constant(self, value: Value, data: Tensor) -> None:
        held = value.handle
        self.replace(value, FxBuilder(self.module, name_symbols(self.placeholders()), held).constant(data, value.dtype))

    def set_input(self, node: Node, value: Value, data: Tensor) -> None:
        made = self.builder(node).constant(data, value.dtype)
        self.node(node.name).replace_input_with(value.handle, made.handle)

    def quantize_linears(
        self, nodes: Sequence[Node], factors: Mapping[str, Tensor] | None = None, inputs: Mapping[str, Value] | None = None
    ) -> None:
        for node in (n for n in nodes if n.op != "gather"):
            builder, held, reads = self.builder(node), self.node(node.name), (inputs or {}).get(node.name)
            factor = (factors or {}).get(node.name)
            made = quantize_linear(builder, held, factor, None if reads is None else builder.handle(reads))
            self.graph.moved(held, made)
            for lookup in (n for n in nodes if n.op == "gather" and n.inputs[0] is node.inputs[1]):
                first, old = self.builder(lookup), self.node(lookup.name)
                assert lookup.inputs[1] is not None
                self.graph.moved(old, look_up(first, old, first.handle(lookup.inputs[1]), made, factor))

    def refuses_rounded(self, node: Node, format: WeightFormat) -> Refusal | None:
        return None

    def store_rounded(self, weights: Mapping[str, RoundedWeight], inputs: Mapping[str, Value] | None = None) -> None:
        found, stored = [n for n in self.graph.of("linear", "matmul", "gather") if n.name in weights], dict[int, Any]()
        for node in sorted(found, key=lambda n: n.op == "gather"):  # layers first: a look-up may read the codes of one
            builder, held, reads = self.builder(node), self.node(node.name), (inputs or {}).get(node.name)
            weight = weights[node.name]
            if node.op == "gather":
                assert node.inputs[1] is not None
                made = store_table(builder, held, weight, builder.handle(node.inputs[1]), stored.get(id(weight)))
            else:
                made = store_rounded(builder, held, weight, None if reads is None else builder.handle(reads), node.name)
                stored[id(weight)] = made
            self.graph.moved(held, made)

    def stored_codes(self, formats: Mapping[str, WeightFormat]) -> dict[str, dict[str, Tensor]]:
        """What `store_rounded` stored for these layers of the model that this one was made from; those that are not there are absent."""
        return stored_codes(self.module, formats)

    # Running.

    def flat_inputs(self, inputs: Mapping[str, Tensor]) -> list[Any]:
        """Named tensors in the order of the placeholders, traced values for those not given. Raises InputMismatch for other names."""
        known = [n.name for n in self.placeholders()]
        if unknown := inputs.keys() - {*known, *self.gone}:
            raise InputMismatch(
                f"the model has no input {', '.join(map(repr, sorted(unknown)))}", next_move=f"It has {', '.join(known)}."
            )
        inputs = self.adapt(inputs) if self.remade else inputs
        return [inputs.get(n.name, leaf) for n, leaf in zip(self.placeholders(), self.convention.leaves(), strict=True)]

    def runner(self) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
        """State that the model keeps stays as it was: each run starts alike."""
        computed = [isinstance(leaf, fx.Node) for leaf in self.output_leaves()]
        module = self.copy().module if written(self.module) else self.module
        if module is not self.module:
            without_writes(module.graph)
            module.recompile()

        def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            with torch.no_grad():
                leaves = module(*self.flat_inputs(inputs))
            return [torch.as_tensor(leaf) for leaf, wanted in zip(leaves, computed, strict=True) if wanted]

        return run

    def tap(self, values: Sequence[Value], inputs: Mapping[str, Tensor]) -> list[Any]:
        return self.tapper(values)(inputs)

    def tapper(self, values: Sequence[Value]) -> Callable[[Mapping[str, Tensor]], list[Any]]:
        if any(v.handle is None for v in values):
            return self.tapper_of_written(values)
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self.module.graph, copied)
        graph.output(tuple(copied[v.handle] for v in values))
        without_writes(graph)
        graph.eliminate_dead_code(has_effect)
        module = fx.GraphModule(self.module, graph)

        def run(inputs: Mapping[str, Tensor]) -> list[Any]:
            with torch.no_grad():
                return [t.clone() for t in module(*self.flat_inputs(inputs))]

        return run

    def tapper_of_written(self, values: Sequence[Value]) -> Callable[[Mapping[str, Tensor]], list[Any]]:
        """Taps of a copy in which the values that exist only in the canonical graph are written."""
        tapped = self.copy()
        twins = {v.name: v for v in (*tapped.graph.inputs, *(o for n in tapped.graph.nodes for o in n.outputs))}
        for value in values:
            twin = twins[value.name]
            if twin.handle is None and twin.producer is not None:
                twin.handle = tapped.builder(twin.producer).handle(twin)
        return tapped.tapper([twins[v.name] for v in values])

    def isolate(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> Callable[[Sequence[Any]], list[Any]]:
        return isolate(self.module, name_symbols(self.placeholders()), inputs, outputs)

    # What users see.

    @property
    def input_specs(self) -> list[InputSpec]:
        specs, symbols = [], name_symbols(self.placeholders())
        for node in self.placeholders():
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                sizes = tuple(s if isinstance(s, int) else None for s in value.shape)
                found = tuple((s, s) if isinstance(s, int) else limits(self.captured.program, s.node.expr) for s in value.shape)
                specs.append(InputSpec(node.name, sizes, value.dtype, found, tuple(map(str, symbols.shape(value)))))
        return specs

    @property
    def output_names(self) -> list[str]:
        named = zip(self.convention.output_names(), self.output_leaves(), strict=True)
        return [name for name, leaf in named if isinstance(leaf, fx.Node)]

    def output_leaves(self) -> tuple[Any, ...]:
        """What the graph returns: nodes, and values that were fixed when it was traced."""
        return next(n for n in self.module.graph.nodes if n.op == "output").args[0]  # type: ignore[return-value]

    def example_inputs(self) -> dict[str, Tensor]:
        return self.named(split(self.convention.signature, self.captured.example))

    def named_inputs(self, inputs: Any) -> dict[str, Tensor]:
        """A user's inputs (tensors or arrays, by position or name) as named tensors. Raises InputMismatch."""
        args, kwargs = as_call(inputs)
        return self.named((tuple(map(as_tensor, args)), {name: as_tensor(x) for name, x in kwargs.items()}))

    def named(self, call: tuple[tuple[Any, ...], Mapping[str, Any]]) -> dict[str, Tensor]:
        leaves = self.convention.flatten(*call)
        tensors = {n.name: leaf for n, leaf in zip(self.placeholders(), leaves, strict=True) if isinstance(leaf, Tensor)}
        check_inputs(self.input_specs, tensors)
        return tensors

    def callable(self) -> FxCallable:
        module = in_place(with_own_state(self.module)) if written(self.module) else self.module
        return FxCallable(module, self.convention, self.input_specs)

    # Saving.

    def save_pt2(self, path: Path, metadata: Mapping[str, str]) -> None:
        with told(self.convention.caches):
            save_program(self.module, self.captured, path, metadata)

    def to_onnx(self) -> Any:
        """The model as an onnx.ModelProto, by torch's own exporter. Raises UnsupportedFormat for a model that keeps state."""
        if kept := written(self.module):
            raise UnsupportedFormat(
                f"an ONNX file keeps no state between calls, and this model writes '{kept[0]}'",
                next_move="Export it as .pt2, or give the model its cache as an input.",
            )
        with told(self.convention.caches):
            return to_onnx(self.module, self.captured, self.output_names, edited=self.edited)


def load_pt2(path: Path) -> tuple[FxHost, dict[str, str]]:
    """The saved model, whose callable has its signature, and the metadata inside the file."""
    captured, metadata = read_with_metadata(path)
    return FxHost.from_captured(captured), metadata


class FxCallable(torch.nn.Module):
    """The optimised model with the signature and the return type of the original."""

    def __init__(self, module: fx.GraphModule, convention: Convention, specs: Sequence[InputSpec]) -> None:
        super().__init__()
        self.graph_module = module
        self.names = [n.name for n in module.graph.nodes if n.op == "placeholder"]
        self.convention = convention
        self.specs = specs
        self.__signature__ = convention.signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.convention.unflatten(self.graph_module(*self.checked(args, kwargs)))

    def checked(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flat inputs of the graph. Raises InputMismatch for what was not traced."""
        leaves = self.convention.flatten(args, kwargs)
        check_inputs(self.specs, {n: leaf for n, leaf in zip(self.names, leaves, strict=True) if isinstance(leaf, Tensor)})
        return leaves


def as_tensor(x: Any) -> Any:
    return torch.from_numpy(x) if type(x).__module__ == "numpy" and hasattr(x, "dtype") else x


def check_inputs(specs: Sequence[InputSpec], tensors: Mapping[str, Tensor]) -> None:
    """Raise InputMismatch where a tensor is not of the form that was traced, or two sizes of one name differ."""
    first: dict[str, tuple[str, int]] = {}
    for spec in specs:
        tensor = tensors[spec.name]
        fits = tensor.dtype == spec.dtype and tensor.ndim == len(spec.shape)
        fits = fits and all(want in (None, got) for want, got in zip(spec.shape, tensor.shape, strict=True))
        if not fits:
            wanted = ", ".join("any" if s is None else str(s) for s in spec.shape)
            raise InputMismatch(
                f"input '{spec.name}' is {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}",
                next_move=f"The model takes {str(spec.dtype).removeprefix('torch.')}[{wanted}].",
            )
        for axis, (low, high) in enumerate(spec.limits):
            if not (low or 0) <= tensor.shape[axis] <= (high or tensor.shape[axis]):
                allowed = " and ".join(f"{word} {n}" for word, n in (("at least", low), ("at most", high)) if n is not None)
                raise InputMismatch(
                    f"dimension {axis} of input '{spec.name}' is {tensor.shape[axis]}; the trace of this model holds for {allowed}",
                    next_move="Optimise again with example inputs of this size.",
                )
            owner, size = first.setdefault(spec.names[axis], (spec.name, tensor.shape[axis]))
            if size != tensor.shape[axis] and not spec.names[axis].isdigit():
                raise InputMismatch(
                    f"'{spec.names[axis]}' is {size} in '{owner}' but {tensor.shape[axis]} in '{spec.name}'",
                    next_move="They were equal in the example inputs; give equal ones, or optimise again with examples that differ.",
                )
