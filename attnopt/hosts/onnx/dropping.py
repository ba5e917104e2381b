"""Inputs and outputs of an ONNX model that it does without: the slots of a cache that belonged to a removed layer.

    inputs past.0.key past.1.key past.2.key    ->   without layer 1    past.0.key past.1.key (which was past.2.key)
    Shape(past.1.key)                          ->   Shape(past.2.key)      the same size, by name

Names of one family differ in one number; those after a dropped one move up, so that whoever counts layers counts what is there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx_ir as ir

from attnopt.hosts.onnx.builder import OnnxBuilder
from attnopt.hosts.onnx.places import Names, Places
from attnopt.ir.graph import Graph, Value
from attnopt.ir.site import Refusal

Family = tuple[str, str]


def unreadable(inputs: Sequence[Value], dropped: Collection[Value]) -> Refusal | None:
    """A refusal where one of the dropped inputs is all that tells some size."""
    told = {dim for v in inputs if v not in dropped for dim in v.shape or ()}
    for value in dropped:
        for dim in value.shape or ():
            if not isinstance(dim, int) and dim not in told:
                return Refusal(f"no other input tells the size {dim}", value.name)
    return None


def forget_outputs(model: ir.Model, dropped: Collection[ir.Value]) -> None:
    """Return these no more; the outputs of their families that stay move up."""
    outputs = list(model.graph.outputs)
    gone = [v for v in outputs if v in dropped]
    new = moved_up([v.name or "" for v in outputs], [v.name or "" for v in gone])
    for held in gone:
        model.graph.outputs.remove(held)
        held.name = f"{held.name}_dropped"
    rename(model.graph.outputs, new)


def let_go(
    model: ir.Model, inputs: Sequence[Value], dropped: Collection[ir.Value], names: Names, first_names: Mapping[str, str]
) -> dict[str, str]:
    """Remove inputs of which nothing is read but sizes, which another input tells from now on; those that stay move up.

    first_names: what inputs that were renamed were called at first. Returns it for the names of now.
    """
    shapes = {v.handle: v.shape or () for v in inputs}
    gone = [held for held in model.graph.inputs if held in dropped]
    new = moved_up([v.name or "" for v in model.graph.inputs], [v.name or "" for v in gone])
    others = Places.of(Graph(inputs=[v for v in inputs if v.handle not in dropped]))
    for held in gone:
        for node in [node for node, _ in held.uses()]:
            if node.op_type != "Shape":
                raise RuntimeError(f"'{held.name}' was dropped, and '{node.name}' ({node.op_type}) reads it still")
            shape = shapes[held]
            part = shape[slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape)))]
            answer = OnnxBuilder(model, others, node, names).joined(part)
            ir.convenience.replace_all_uses_with(node.outputs[0], answer.handle, replace_graph_outputs=True)
            node.graph.remove(node, safe=True)  # type: ignore[union-attr]
        model.graph.inputs.remove(held)
    before = [v.name or "" for v in model.graph.inputs]
    rename(model.graph.inputs, new)
    return {new.get(name, name): first_names.get(name, name) for name in before if name in new or name in first_names}


def moved_up(names: Sequence[str], dropped: Collection[str]) -> dict[str, str]:
    """New names of those that stay, where they change. names: all of the inputs, or all of the outputs, before."""
    families: dict[Family, dict[int, str]] = {}
    for name in names:
        for family, number in numbers_in(name):
            families.setdefault(family, {})[number] = name
    lost = {max((f for f, _ in numbers_in(name)), key=lambda f: len(families[f]), default=None) for name in dropped}
    return {
        members[number]: f"{family[0]}{number - gone}{family[1]}"
        for family in lost
        if family is not None
        for members in (families[family],)
        for number in sorted(members)
        if members[number] not in dropped and (gone := sum(n < number and members[n] in dropped for n in members))
    }


def numbers_in(name: str) -> Iterable[tuple[Family, int]]:
    """Each whole number in a name, with what stands around it."""
    for found in re.finditer(r"\d+", name):
        if found.group() == str(int(found.group())):
            yield (name[: found.start()], name[found.end() :]), int(found.group())


def rename(values: Iterable[ir.Value], new: Mapping[str, str]) -> None:
    """Rename values all at once: the new name of one may be the old name of another."""
    changing = [(v, new[v.name]) for v in values if v.name in new]
    for value, name in changing:
        value.name = f"{name} moving up"
    for value, name in changing:
        value.name = name
