"""Trees of arguments and results in which caches are nodes, without telling the rest of the process so.

    with told(forms): torch.export.export(model, …)   ->   within, torch knows these caches; afterwards what it knew before
    flatten({"past": DynamicCache}, forms)            ->   tensors, spec; torch's tables are only read

torch keeps one table of container classes for the whole process, and transformers' own exporters write the same classes into it
in forms of their own. Who exports beside us must find there what they put there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

TELLING = threading.RLock()  # held as long as the tables say what others have not written: one thread exports at a time
ABSENT: Any = object()


@dataclass(frozen=True)
class Form:
    """What torch's tables say of one class: how it comes apart and together, its name in files, its flattening by a known spec."""

    node: Any = ABSENT
    stored: Any = ABSENT
    by_spec: Any = ABSENT
    by_spec_exactly: Any = ABSENT

    @classmethod
    def known(cls, kind: type) -> Form:
        return cls(*(table.get(kind, ABSENT) for table in tables()))

    def write(self, kind: type) -> None:
        for table, entry in zip(tables(), (self.node, self.stored, self.by_spec, self.by_spec_exactly), strict=True):
            put(table, kind, entry)


Forms = Mapping[type, Form]


def tables() -> tuple[dict[type, Any], ...]:
    return (
        pytree.SUPPORTED_NODES,
        pytree.SUPPORTED_SERIALIZED_TYPES,
        fx_pytree.SUPPORTED_NODES,
        fx_pytree.SUPPORTED_NODES_EXACT_MATCH,
    )  # type: ignore[return-value]


def put(table: dict[Any, Any], key: Any, entry: Any) -> None:
    if entry is ABSENT:
        table.pop(key, None)
    else:
        table[key] = entry


@contextmanager
def told(forms: Forms) -> Iterator[None]:
    """Within, torch knows these classes in these forms. Scopes may nest; each puts back what it found, errors or not."""
    with TELLING:
        found = {kind: Form.known(kind) for kind in forms}
        names = {form.stored.serialized_type_name: kind for kind, form in forms.items() if form.stored is not ABSENT}
        named = {name: pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name, ABSENT) for name in names}
        try:
            for kind, form in forms.items():
                form.write(kind)
            pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.update(names)
            yield
        finally:
            for kind, form in found.items():
                form.write(kind)
            for name, entry in named.items():
                put(pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE, name, entry)


def flatten(tree: Any, forms: Forms) -> tuple[list[Any], pytree.TreeSpec]:
    """`pytree.tree_flatten` where these classes have these forms."""
    leaves: list[Any] = []

    def apart(part: Any) -> pytree.TreeSpec:
        kind = pytree._get_node_type(part)
        node = node_of(kind, forms)
        if node is None:
            leaves.append(part)
            return pytree.treespec_leaf()
        children, context = node.flatten_fn(part)
        return pytree.TreeSpec(kind, context, [apart(child) for child in children])

    return leaves, apart(tree)


def unflatten(leaves: Iterable[Any], spec: pytree.TreeSpec, forms: Forms) -> Any:
    """`pytree.tree_unflatten` where these classes have these forms."""
    remaining = iter(leaves)

    def together(part: pytree.TreeSpec) -> Any:
        if part.is_leaf():
            return next(remaining)
        children = [together(child) for child in part.children()]
        return node_of(part.type, forms).unflatten_fn(children, part.context)

    return together(spec)


def node_of(kind: Any, forms: Forms) -> Any:
    """How a class comes apart; None for a leaf."""
    form = forms.get(kind)
    node = pytree.SUPPORTED_NODES.get(kind, ABSENT) if form is None else form.node
    return None if node is ABSENT else node


def nodes(spec: pytree.TreeSpec) -> Iterator[pytree.TreeSpec]:
    """Every part of a spec that is no leaf, the whole first."""
    if not spec.is_leaf():
        yield spec
        for child in spec.children():
            yield from nodes(child)
