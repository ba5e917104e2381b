"""The ONNX host: one model, shown as a canonical graph, edited, run by onnxruntime, tapped and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
from torch import Tensor

from attnopt.errors import InputMismatch
from attnopt.hosts.onnx.builder import OnnxBuilder
from attnopt.hosts.onnx.examples import as_mapping, example_inputs
from attnopt.hosts.onnx.execution import runner
from attnopt.hosts.onnx.inference import infer, needs_inference
from attnopt.hosts.onnx.int8 import quantize
from attnopt.hosts.onnx.reading import read
from attnopt.hosts.onnx.region import isolate
from attnopt.hosts.onnx.shape_reads import reroute
from attnopt.hosts.onnx.translate import translate
from attnopt.hosts.onnx.writing import write
from attnopt.ir.graph import Graph, Node, Value
from attnopt.ir.site import Refusal


@dataclass(frozen=True)
class InputSpec:
    """One tensor that the model reads; symbolic sizes are None."""

    name: str
    shape: tuple[int | None, ...] | None
    dtype: torch.dtype | None


@dataclass
class OnnxHost:
    """An onnx-ir model that belongs to attnopt; the user's file or proto is never touched."""

    model: ir.Model
    kind: str = "onnx"
    _graph: Graph | None = field(default=None, repr=False)
    _names: set[str] | None = field(default=None, repr=False)

    @classmethod
    def from_model(cls, model: Any) -> OnnxHost:
        """Open a path or an onnx.ModelProto. Raises UnreadableModel and UnsupportedFormat."""
        return cls(named(read(model)))

    @property
    def graph(self) -> Graph:
        """The canonical graph of the model as it is now; read again after `finish`."""
        if self._graph is None:
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
        return OnnxHost(self.model.clone())

    # Editing.

    @property
    def names(self) -> set[str]:
        """Every name that is taken."""
        if self._names is None:
            self._names = {v.name or "" for n in self.model.graph for v in n.outputs} | {n.name or "" for n in self.model.graph}
            self._names |= set(self.model.graph.initializers) | {v.name or "" for v in self.model.graph.inputs}
        return self._names

    def builder(self, before: Node) -> OnnxBuilder:
        place = before.outputs[0].handle or next(v.handle for v in later(self.graph, before) if v.handle is not None)
        return OnnxBuilder(self.model, self.graph, place.producer(), self.names)

    def replace(self, old: Value, new: Value) -> None:
        """Let everything read `new`; a graph output keeps its name."""
        held, made = old.handle, new.handle
        ir.convenience.replace_all_uses_with(held, made)
        outputs = self.model.graph.outputs
        if any(o is held for o in outputs):
            held.name, made.name = f"{held.name}_replaced", held.name
            made.shape, made.type = held.shape, held.type
            for i, output in enumerate(list(outputs)):
                if output is held:
                    outputs[i] = made

    def finish(self) -> None:
        reroute(self.model, self.graph, self.names)
        RemoveUnusedNodesPass()(self.model)
        RemoveUnusedOpsetsPass()(self.model)
        self.model.graph.sort()
        self._graph = self._names = None

    def quantize_linears(self, nodes: Sequence[Node]) -> None:
        quantized = quantize(self.model, [n.name for n in nodes])
        quantized.metadata_props.update(self.model.metadata_props)
        self.model = quantized
        self._graph = self._names = None

    def convert_opset(self, to: int) -> OnnxHost | Refusal:
        """The same model at a higher opset, by ONNX's own converter and checked; or why it cannot be."""
        try:
            converted = onnx.version_converter.convert_version(ir.to_proto(self.model), to)
            onnx.checker.check_model(converted)
        except Exception as failure:
            return Refusal(f"the model does not convert to opset {to}: {str(failure).splitlines()[0][:160]}")
        return OnnxHost(named(ir.serde.deserialize_model(converted)))

    # Running.

    def runner(self) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
        return runner(self.model)

    def tap(self, values: Sequence[Value], inputs: Mapping[str, Tensor]) -> list[Any]:
        wanted = [v.handle.name for v in values]
        tapped = self.model.clone()
        made = {v.name: v for n in tapped.graph for v in n.outputs} | {v.name: v for v in tapped.graph.inputs}
        present = {o.name for o in tapped.graph.outputs}
        given = {v.name for v in tapped.graph.inputs}
        for name in dict.fromkeys(wanted):
            if name not in present and name not in given:
                tapped.graph.outputs.append(made[name])
        results = dict(zip([o.name for o in tapped.graph.outputs], runner(tapped)(inputs), strict=True))
        return [inputs[name] if name in given else results[name] for name in wanted]

    def isolate(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> Callable[[Sequence[Any]], list[Any]]:
        return isolate(self.model, self.graph, inputs, outputs)

    # What users see.

    @property
    def input_specs(self) -> list[InputSpec]:
        return [
            InputSpec(
                v.name,
                None if v.shape is None else tuple(d if isinstance(d, int) else None for d in v.shape),
                getattr(torch, v.dtype) if v.dtype else None,
            )
            for v in self.graph.inputs
        ]

    @property
    def output_names(self) -> list[str]:
        return [o.name or "" for o in self.model.graph.outputs]

    def example_inputs(self) -> dict[str, Tensor]:
        return example_inputs(self.graph)

    def named_inputs(self, inputs: Any) -> dict[str, Tensor]:
        """A user's arrays or tensors, by position or name, as named tensors. Raises InputMismatch."""
        specs = {s.name: s for s in self.input_specs}
        given = as_mapping(list(specs), inputs)
        wanted = f"The model reads {', '.join(describe(s) for s in specs.values())}."
        for name in given:
            if name not in specs:
                raise InputMismatch(f"the model has no input '{name}'", next_move=wanted)
        for name in specs:
            if name not in given:
                raise InputMismatch(f"input '{name}' is missing", next_move=wanted)
        return {name: checked(spec, given[name]) for name, spec in specs.items()}

    def callable(self) -> Callable[..., list[np.ndarray]]:
        """A function of the model's inputs, by position or name or as one dict, that returns numpy arrays in output order."""
        run = self.runner()

        def call(*args: Any, **kwargs: Any) -> list[np.ndarray]:
            names = [s.name for s in self.input_specs]
            inputs: Any = args[0] if len(args) == 1 and isinstance(args[0], Mapping) else dict(as_mapping(names, args)) | kwargs
            return [as_array(t) for t in run(self.named_inputs(inputs))]

        return call

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        write(self.model, path, metadata)


def named(model: ir.Model) -> ir.Model:
    """Every node and value has a name of its own, so that copies agree on them."""
    NameFixPass()(model)
    return model


def later(graph: Graph, node: Node) -> list[Value]:
    """Outputs of the canonical nodes from this one on that came from the same ONNX node."""
    start = graph.nodes.index(node)
    return [v for n in graph.nodes[start:] if n.name == node.name for v in n.outputs]


def describe(spec: InputSpec) -> str:
    shape = "any shape" if spec.shape is None else "[" + ", ".join("any" if s is None else str(s) for s in spec.shape) + "]"
    return f"{spec.name}: {str(spec.dtype).removeprefix('torch.')}{shape}"


def checked(spec: InputSpec, given: Any) -> Tensor:
    tensor = given if isinstance(given, Tensor) else torch.from_numpy(np.asarray(given))
    fits = spec.dtype in (None, tensor.dtype)
    if spec.shape is not None:
        fits = fits and tensor.ndim == len(spec.shape)
        fits = fits and all(want in (None, got) for want, got in zip(spec.shape, tensor.shape, strict=True))
    if not fits:
        raise InputMismatch(
            f"input '{spec.name}' is {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}",
            next_move=f"The model takes {describe(spec)}.",
        )
    return tensor


def as_array(tensor: Tensor) -> np.ndarray:
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
