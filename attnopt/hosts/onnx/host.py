"""The ONNX host: one model, shown as a canonical graph, edited, run by onnxruntime, tapped and written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
from torch import Tensor

from attnopt.hosts.adapting import Remake, adapted
from attnopt.hosts.onnx.builder import OnnxBuilder
from attnopt.hosts.onnx.checking import verify
from attnopt.hosts.onnx.conversion import convert
from attnopt.hosts.onnx.dropping import forget_outputs, let_go, unreadable
from attnopt.hosts.onnx.element_types import as_onnx, dtype_name
from attnopt.hosts.onnx.examples import example_inputs
from attnopt.hosts.onnx.execution import runner
from attnopt.hosts.onnx.inference import infer, needs_inference
from attnopt.hosts.onnx.inputs import InputSpec, as_array, call_inputs, named_inputs
from attnopt.hosts.onnx.int8 import Codes, quantize_layer
from attnopt.hosts.onnx.places import Names, Places, by_node
from attnopt.hosts.onnx.presents import make_presents
from attnopt.hosts.onnx.reading import read
from attnopt.hosts.onnx.region import isolate
from attnopt.hosts.onnx.rounded_weights import Stored, refusal, refuses_rows, store_rounded, store_table, stored_codes
from attnopt.hosts.onnx.shape_reads import reroute
from attnopt.hosts.onnx.splitting import split_input, split_output
from attnopt.hosts.onnx.translate import translate
from attnopt.hosts.onnx.writing import write
from attnopt.ir.collection import paused_collection
from attnopt.ir.dims import Shape
from attnopt.ir.graph import Graph, Node, Value
from attnopt.ir.site import NotIsolated, Refusal, Site
from attnopt.rounding.rounded_weight import RoundedWeight
from attnopt.rounding.weight_format import WeightFormat


@dataclass
class OnnxHost:
    """An onnx-ir model that belongs to attnopt; the user's file or proto is never touched."""

    model: ir.Model
    kind: str = "onnx"
    _graph: Graph | None = field(default=None, repr=False)
    _names: Names | None = field(default=None, repr=False)
    _places: dict[Node, tuple[Graph, Places]] | None = field(default=None, repr=False)
    _written: list[ir.Node] = field(default_factory=list, repr=False)
    _dropped: tuple[ir.Value, ...] = field(default=(), repr=False)
    _remade: dict[str, tuple[str, Remake, int]] = field(default_factory=dict, repr=False)  # inputs that were parts of one
    _first_names: dict[str, str] = field(default_factory=dict, repr=False)  # of inputs that have another name now

    @classmethod
    def from_model(cls, model: Any) -> OnnxHost:
        """Open a path or an onnx.ModelProto. Raises UnreadableModel and UnsupportedFormat."""
        return cls(named(read(model)))

    @property
    def graph(self) -> Graph:
        """The canonical graph of the model as it is now; read again after `finish`."""
        if self._graph is None:
            with paused_collection():
                if needs_inference(self.model):
                    infer(self.model)
                self._graph = translate(self.model)
        return self._graph

    @property
    def opset(self) -> int:
        return self.model.opset_imports.get("", 1)

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.model.metadata_props)

    def copy(self) -> OnnxHost:
        return OnnxHost(self.model.clone(), _first_names=dict(self._first_names), _remade=dict(self._remade))

    # Editing.

    @property
    def names(self) -> Names:
        """Every name that is taken."""
        if self._names is None:
            nodes = list(self.model.graph.all_nodes())  # those of bodies share the names
            graphs = list(self.model.graphs())
            self._names = Names(v.name or "" for n in nodes for v in n.outputs)
            self._names.update(n.name or "" for n in nodes)
            self._names.update(name for graph in graphs for name in graph.initializers)
            self._names.update(v.name or "" for graph in graphs for v in graph.inputs)
        return self._names

    @property
    def places(self) -> dict[Node, tuple[Graph, Places]]:
        """The graph, the main one or a body, in which a canonical node stands, and what is where in it."""
        if self._places is None:
            self._places = by_node(self.graph)
        return self._places

    def builder(self, before: Node) -> OnnxBuilder:
        graph, places = self.places[before]
        held = before.outputs[0].handle
        if held is None:  # a later node of the same ONNX node makes what it has
            nodes = islice(graph.nodes, places.order[before], None)
            held = next(v.handle for n in nodes for v in n.outputs if n.name == before.name and v.handle is not None)
        return OnnxBuilder(self.model, places, held.producer(), self.names, self._written)

    def replace(self, old: Value, new: Value) -> None:
        """Let everything read `new`; a graph output keeps its name, shape and type."""
        held, made = old.handle, new.handle
        output = held.is_graph_output()
        if output and (made.is_graph_output() or made.is_graph_input()):  # it has a name of its own to keep
            made = self.builder(old.producer).node("Identity", [new], new.shape or (), new.dtype).handle  # type: ignore[arg-type]
        ir.convenience.replace_all_uses_with(held, made, replace_graph_outputs=output)
        if output:
            name, held.name = held.name, self.names.unique(f"{held.name}_replaced")
            made.name, made.shape, made.type = name, held.shape, held.type

    def finish(self) -> None:
        forget_outputs(self.model, self._dropped)
        for graph, places in {id(graph): (graph, places) for graph, places in self.places.values()}.values():
            make_presents(self.model, graph, places, self.names, self._written, self.replace)
        reroute(self.model, self.graph, self.names)
        RemoveUnusedNodesPass()(self.model)
        self._first_names = let_go(self.model, self.graph.inputs, self._dropped, self.names, self._first_names)
        RemoveUnusedNodesPass()(self.model)
        RemoveUnusedOpsetsPass()(self.model)
        verify(self.model, self._written)
        self._graph = self._names = self._places = None
        self._written, self._dropped = [], ()

    def refuses_change(
        self, changes: Collection[str], sites: Collection[Site], shapes: Mapping[str, Mapping[str, int]]
    ) -> Refusal | None:
        return None

    def caches(self, site: Site) -> bool:
        return False  # a graph shows its caches

    def refuses_drop(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> Refusal | None:
        return unreadable([v for v in self.graph.inputs if v.handle not in self._dropped], inputs)

    def drop(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> None:
        given = zip(self.model.graph.outputs, self.graph.outputs, strict=True)
        left = [held for held, v in given if any(v is o for o in outputs)]
        self._dropped = (*self._dropped, *(v.handle for v in inputs), *left)

    def adapt(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return adapted([v.name or "" for v in self.model.graph.inputs], inputs, self._first_names, self._remade)

    def refuses_split(
        self, inputs: Sequence[Value], outputs: Sequence[Value], parts: Sequence[Sequence[tuple[str, Shape, str]]] = ()
    ) -> Refusal | None:
        return None

    def split_input(self, value: Value, parts: Sequence[tuple[str, Shape, str]], made: Remake) -> list[Value]:
        held, source = value.handle, value.name
        values = split_input(self.model, held, parts, self.names)
        self._remade |= {v.name: (source, made, i) for i, v in enumerate(values)}
        return values

    def split_outputs(self, parts: Mapping[Value, Sequence[tuple[str, Value]]]) -> None:
        given = list(zip(self.model.graph.outputs, self.graph.outputs, strict=True))
        for held, value in given:
            split_output(self.model, held, parts.get(value, ()), self.names)
        self.graph.outputs = [x for v in self.graph.outputs for x in ([part for _, part in parts[v]] if v in parts else [v])]

    def set_constant(self, value: Value, data: Tensor) -> None:
        held = value.handle
        name = self.names.unique(f"{held.name}_changed")
        made = ir.Value(name=name, type=held.type, shape=held.shape, const_value=as_onnx(data, name))
        self.model.graph.register_initializer(made)
        ir.convenience.replace_all_uses_with(held, made)

    def set_input(self, node: Node, value: Value, data: Tensor) -> None:
        name = self.names.unique(f"{value.name}_of_{node.name}")
        held = next(n for n in self.model.graph.all_nodes() if n.name == node.name)
        turned = [i for i, given in enumerate(held.inputs) if given is not None and transposes(given, value.handle)]
        data = data.T.contiguous() if turned else data
        made = ir.Value(name=name, type=value.handle.type, shape=ir.Shape(list(data.shape)), const_value=as_onnx(data, name))
        self.model.graph.register_initializer(made)
        for i, given in enumerate(held.inputs):
            if given is value.handle or i in turned:
                held.replace_input_with(i, made)

    def quantize_linears(
        self, nodes: Sequence[Node], factors: Mapping[str, Tensor] | None = None, inputs: Mapping[str, Value] | None = None
    ) -> None:
        wanted = {n.name: n for n in nodes if n.op != "gather"}
        for held in [n for n in self.model.graph.all_nodes() if n.name in wanted and n.op_type in ("MatMul", "Gemm")]:
            node = wanted[held.name or ""]
            weight, factor, reads = node.inputs[1], (factors or {}).get(node.name), (inputs or {}).get(node.name)
            assert weight is not None and weight.load is not None
            data = weight.load().T if node.op == "linear" else weight.load()
            data = data if factor is None else data * factor[:, None]
            if reads is not None:
                held.replace_input_with(0, self.builder(node).handle(reads))
            output, tied = held.outputs[0], self.lookups(node, nodes)
            codes = Codes(self.model, self.names, self._written, factor)
            self.graph.moved(output, quantize_layer(held, data, codes, by_rows=bool(tied)))
            for lookup in tied:
                self.graph.moved(lookup.outputs[0], codes.looked_up(lookup))
        self.model.graph.sort()

    def lookups(self, layer: Node, nodes: Sequence[Node]) -> list[ir.Node]:
        """Those of the nodes that look rows up in the weight of a layer."""
        names = {n.name for n in nodes if n.op == "gather" and n.inputs[0] is layer.inputs[1]}
        return [n for n in self.model.graph.all_nodes() if n.name in names and n.op_type == "Gather"]

    def refuses_rounded(self, node: Node, format: WeightFormat) -> Refusal | None:
        shape = node.inputs[1].shape if len(node.inputs) > 1 and node.inputs[1] is not None else None
        if node not in self.places or not shape or self.places[node][0] is not self.graph:
            return Refusal("the layer stands inside of a node's own graph", node)
        if node.op == "gather":
            return refuses_rows(format)
        return refusal(format, int(shape[1 if node.op == "linear" else 0]))  # type: ignore[arg-type]

    def store_rounded(self, weights: Mapping[str, RoundedWeight], inputs: Mapping[str, Value] | None = None) -> None:
        wanted = {n.name: n for n in self.graph.of("linear", "matmul", "gather") if n.name in weights}
        found = [n for n in self.model.graph.all_nodes() if n.name in wanted and n.op_type in ("MatMul", "Gemm", "Gather")]
        stored: dict[int, Stored] = {}  # of layers, which come first, by the rounded weight
        for held in sorted(found, key=lambda n: n.op_type == "Gather"):
            node = wanted[held.name or ""]
            if (reads := (inputs or {}).get(node.name)) is not None:
                held.replace_input_with(0, self.builder(node).handle(reads))
            output, store = held.outputs[0], store_table if held.op_type == "Gather" else store_rounded
            self.graph.moved(output, store(self.model, held, weights[node.name], self.names, self._written, stored))
        self.model.graph.sort()

    def stored_codes(self, formats: Mapping[str, WeightFormat]) -> dict[str, dict[str, Tensor]]:
        """What `store_rounded` stored for these layers of the model that this one was made from; those that are not there are absent."""
        return stored_codes(self.model, formats)

    def convert_opset(self, to: int) -> OnnxHost | Refusal:
        """The same model at a higher opset, by ONNX's own converter and checked; or why it cannot be."""
        converted = convert(self.model, to)
        return converted if isinstance(converted, Refusal) else OnnxHost(named(converted))

    # Running.

    def runner(self) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
        run, names = runner(self.model), {v.name for v in self.model.graph.inputs}
        changed = bool(self._first_names or self._remade)
        return lambda inputs: run(self.adapt(inputs) if changed and inputs.keys() != names else inputs)

    def tap(self, values: Sequence[Value], inputs: Mapping[str, Tensor]) -> list[Any]:
        return self.tapper(values)(inputs)

    def tapper(self, values: Sequence[Value]) -> Callable[[Mapping[str, Tensor]], list[Any]]:
        tapped = self.copy()
        names = [tapped.written_name(v) for v in values]
        graph = tapped.model.graph
        graph.sort()
        made = {v.name: v for n in graph for v in n.outputs}
        given = {v.name for v in graph.inputs}
        present = {o.name for o in graph.outputs}
        for name, value in zip(names, values, strict=True):
            if name not in present and name not in given and not value.is_constant:
                if name not in made:
                    raise NotIsolated(f"'{name}' is made inside of a node's own graph")
                graph.outputs.append(made[name])
                present.add(name)
        running = None if present.isdisjoint(names) else runner(tapped.model)
        outputs = [o.name or "" for o in graph.outputs]

        def run(inputs: Mapping[str, Tensor]) -> list[Any]:
            results = dict(inputs)
            if running is not None:
                results |= zip(outputs, running(inputs), strict=True)
            return [v.load() if v.load is not None else results[name] for name, v in zip(names, values, strict=True)]

        return run

    def written_name(self, value: Value) -> str:
        """The ONNX name of a value of an equal host; one that is only in the canonical graph is written here."""
        if value.handle is not None or value.producer is None:
            return (value.handle.name if value.handle is not None else value.name) or ""
        twin = next(v for n in self.places for v in n.outputs if v.name == value.name)
        assert twin.producer is not None
        return self.builder(twin.producer).handle(twin).name or ""

    def isolate(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> Callable[[Sequence[Any]], list[Any]]:
        return isolate(self.model, self.graph, inputs, outputs)

    # What users see.

    @property
    def input_specs(self) -> list[InputSpec]:
        return [InputSpec(v.name or "", sizes(v), torch_type(v)) for v in self.model.graph.inputs]

    @property
    def output_names(self) -> list[str]:
        return [o.name or "" for o in self.model.graph.outputs]

    def example_inputs(self) -> dict[str, Tensor]:
        return example_inputs(self.graph)

    def named_inputs(self, inputs: Any) -> dict[str, Tensor]:
        """A user's arrays or tensors, by position or name, as named tensors. Raises InputMismatch."""
        return named_inputs(self.input_specs, inputs)

    def callable(self) -> Callable[..., list[np.ndarray]]:
        """A function of the model's inputs, by position or name or as one dict, that returns numpy arrays in output order."""
        run, specs = self.runner(), self.input_specs
        names = [s.name for s in specs]

        def call(*args: Any, **kwargs: Any) -> list[np.ndarray]:
            return [as_array(t) for t in run(named_inputs(specs, call_inputs(names, args, kwargs)))]

        return call

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        write(self.model, path, metadata)
        self._graph = self._places = None  # its constants may read the file that was just replaced


def named(model: ir.Model) -> ir.Model:
    """Every node and value has a name of its own, so that copies agree on them."""
    NameFixPass()(model)
    return model


def sizes(value: ir.Value) -> tuple[int | None, ...] | None:
    return None if value.shape is None else tuple(d if isinstance(d, int) else None for d in value.shape)


def torch_type(value: ir.Value) -> torch.dtype | None:
    return getattr(torch, dtype_name(value.dtype)) if dtype_name(value.dtype) else None


def transposes(given: ir.Value, held: ir.Value) -> bool:
    """Whether a value is another, transposed by a node."""
    made = given.producer()
    return made is not None and made.op_type == "Transpose" and made.inputs[0] is held
