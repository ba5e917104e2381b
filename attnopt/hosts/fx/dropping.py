"""Inputs and outputs of an FX graph that a rewritten model does without: the slots of a cache that belonged to a removed layer.

%past_3 = placeholder; sym_size(%past_3, 2)      ->      sym_size(%past_4, 2)       the same length, by name
return (logits, …, %present_3, …)                ->      return (logits, …)
copy_(%key_cache_3, …)                           ->      nothing: state that the model kept in a buffer
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from attnopt.hosts.fx.state import writes_state
from attnopt.hosts.fx.symbols import name_symbols
from attnopt.ir.dims import Dim, Shape, evaluate
from attnopt.ir.graph import Value
from attnopt.ir.site import Refusal

if TYPE_CHECKING:
    from attnopt.hosts.fx.host import FxHost

SIZE = torch.ops.aten.sym_size.int


def leaves_of(host: FxHost, inputs: Sequence[fx.Node], outputs: Sequence[Value]) -> tuple[frozenset[int], frozenset[int]]:
    """Their positions among the leaves that the model takes and returns. State is among neither."""
    left = [n for n in host.placeholders() if n not in host.dropped]
    taken = [i for i, n in enumerate(left) if any(n is x for x in inputs)]
    tensors = [i for i, n in enumerate(host.output_leaves()) if isinstance(n, fx.Node) and is_real(n.meta.get("val"))]
    given = zip(tensors, host.graph.outputs, strict=False)  # behind them stands what is written to state
    return frozenset(taken), frozenset(i for i, value in given if any(value is x for x in outputs))


def is_real(held: object) -> bool:
    return isinstance(held, Tensor) and not held.is_complex()


def unreadable(placeholders: Sequence[fx.Node], inputs: Collection[fx.Node]) -> Refusal | None:
    """A refusal where one of the inputs is all that tells some size."""
    sizes = sizes_of(placeholders, inputs)
    for node in inputs:
        lost = (
            []
            if node.op != "placeholder"
            else [d for d in dims_of(placeholders, node) if not isinstance(d, int) and d not in sizes]
        )
        if lost:
            return Refusal(f"no other input tells the size {lost[0]}", node.name)
    return None


def dims_of(placeholders: Sequence[fx.Node], node: fx.Node) -> tuple[Dim, ...]:
    return name_symbols(placeholders).shape(node.meta["val"])


def sizes_of(placeholders: Sequence[fx.Node], without: Collection[fx.Node]) -> dict[Dim, tuple[fx.Node, int]]:
    """For each size the input, of those that stay, and the axis that tell it."""
    symbols = name_symbols(placeholders)
    found: dict[Dim, tuple[fx.Node, int]] = {}
    for node in placeholders:
        held = node.meta.get("val")
        if isinstance(held, Tensor) and node not in without:
            for axis, dim in enumerate(symbols.shape(held)):
                found.setdefault(dim, (node, axis))
    return found


def split_placeholder(module: fx.GraphModule, node: fx.Node, parts: Sequence[tuple[str, Shape, str]]) -> list[fx.Node]:
    """Placeholders behind one: `int8_past`, … of (word, shape, dtype); a word of digits goes behind the name.

    Sizes of the shape are those of the old one, numbers, or computed from both: blocks of 32 tokens are past // 32.
    """
    held, made, before = node.meta["val"], [], node
    symbols = name_symbols([n for n in module.graph.nodes if n.op == "placeholder"])
    sizes = dict(zip(symbols.shape(held), held.shape, strict=True))
    named = {str(dim): size for dim, size in sizes.items()}
    for word, shape, dtype in parts:
        with module.graph.inserting_after(before):
            before = module.graph.placeholder(f"{node.name}_{word}" if word[0].isdigit() else f"{word}_{node.name}")
        before.meta["val"] = held.new_empty(
            [sizes[d] if d in sizes else evaluate(d, named) for d in shape], dtype=getattr(torch, dtype)
        )
        made.append(before)
    return made


def unvarying(placeholders: Sequence[fx.Node], node: fx.Node, parts: Sequence[tuple[str, Shape, str]]) -> Refusal | None:
    """A refusal where a computed size is 0 or 1 in the trace: torch takes those for numbers."""
    held = node.meta["val"]
    sizes = [
        (dim, s) for dim, s in zip(name_symbols(placeholders).shape(held), held.shape, strict=True) if not isinstance(s, int)
    ]
    hints = {str(dim): int(s.node.hint) for dim, s in sizes}
    known = {dim for dim, _ in sizes}
    for dim in (d for _, shape, _ in parts for d in shape if not isinstance(d, int) and d not in known):
        if evaluate(dim, hints) < 2:
            reason = f"the model was traced where {dim} is {evaluate(dim, hints)}, which torch would take for all lengths"
            return Refusal(reason, node.name, remedy="trace it with a longer past")
    return None


def drop(module: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Collection[int]) -> list[fx.Node]:
    """Return no more what stands at these positions, write no more the state among the inputs; the placeholders to let go."""
    end = next(n for n in module.graph.nodes if n.op == "output")
    end.args = (tuple(leaf for i, leaf in enumerate(end.args[0]) if i not in outputs),)
    state = {n.target for n in inputs if n.op == "get_attr"}
    for node in list(module.graph.nodes):
        if writes_state(node) and node.args[0].target in state:
            module.graph.erase_node(node)
    return [n for n in inputs if n.op == "placeholder"]


def let_go(module: fx.GraphModule, dropped: Iterable[fx.Node]) -> None:
    """Erase placeholders of which nothing is read but sizes, which another input tells from now on."""
    dropped = list(dropped)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    sizes = sizes_of(placeholders, dropped) if dropped else {}
    for node in dropped:
        for user in list(node.users):
            if user.target is not SIZE:
                raise RuntimeError(f"'{node.name}' was dropped, and '{user.name}' reads it still")
            other, axis = sizes[dims_of(placeholders, node)[user.args[1]]]  # type: ignore[index]
            user.args = (other, axis)
            user.meta["val"] = other.meta["val"].shape[axis]
        module.graph.erase_node(node)
