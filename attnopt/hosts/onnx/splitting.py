"""Inputs and outputs of an ONNX model that become several: a cache in int8 comes and goes with its scales.

    past.0.key [float]   ->   past.0.key [int8], past.0.key_scales [float], past.0.key_zeros [float]      likewise present.0.key

The first part keeps name and place, so that whoever asks its shape is answered as before. An input that only becomes another one takes
the word into its name: by that the old form is told from the new.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from attnopt.hosts.onnx.element_types import TYPES
from attnopt.hosts.onnx.places import Names
from attnopt.ir.dims import Shape
from attnopt.ir.graph import Value


def split_input(model: ir.Model, held: ir.Value, parts: Sequence[tuple[str, Shape, str]], names: Names) -> list[Value]:
    """The parts (word, shape, dtype) as values: the input itself, of another type now, and new inputs behind it."""
    at, made = model.graph.inputs.index(held), []
    for i, (word, shape, dtype) in enumerate(parts):
        value = held if i == 0 else ir.Value(name=names.unique(f"{held.name}_{word}"))
        if len(parts) == 1:
            value.name = names.unique(f"{held.name}_{word}")
        value.type = ir.TensorType(TYPES[dtype])
        value.shape = ir.Shape([d if isinstance(d, int) else str(d) for d in shape])
        if i > 0:
            model.graph.inputs.insert(at + i, value)
        made.append(Value(value.name or "", shape, dtype, handle=value))
    return made


def split_output(model: ir.Model, held: ir.Value, parts: Sequence[tuple[str, Value]], names: Names) -> None:
    """Return the parts where this was returned: the first under its name, the others under its name and their word."""
    if not parts:
        return
    at, name = model.graph.outputs.index(held), held.name
    model.graph.outputs.remove(held)
    held.name = names.unique(f"{name}_before")
    for i, (word, part) in enumerate(parts):
        part.handle.name = name if i == 0 else names.unique(f"{name}_{word}")
        model.graph.outputs.insert(at + i, part.handle)
