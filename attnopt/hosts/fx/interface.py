"""What a torch model takes and returns, changed with its graph: tensors that vanish, and tensors that become several.

    forward(ids, past=DynamicCache of 8 layers) -> (logits, DynamicCache of 8)
        ->  without layer 3    forward(ids, past=DynamicCache of 7 layers) -> (logits, DynamicCache of 7)

    forward(ids, past=[(k, v), …])  ->  int8 cache         forward(ids, past=[((codes, scales, zeros), (codes, scales, zeros)), …])

A container keeps its class and loses the element; one that is left empty goes as well, up to a whole parameter. The layers of a
cache after a dropped one move up, which is their new number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.utils import _pytree as pytree

from attnopt.hosts.fx.caches import KEYS
from attnopt.hosts.fx.call import Arguments, Convention, split
from attnopt.hosts.fx.capture import Captured
from attnopt.hosts.fx.trees import flatten, unflatten
from attnopt.ir.site import Refusal

Remake = Callable[[Any], Sequence[Any]]


class Kept(Exception):
    """Internal: a container that cannot hold other elements than it does."""


def changed(captured: Captured, inputs: Mapping[int, Remake], outputs: Mapping[int, int]) -> Captured:
    """The calling convention and the example with other leaves at these positions.

    inputs: what is made of a leaf: nothing, where it is dropped, or several, which are a tuple then. outputs: how many come. Raises Kept.
    """
    convention = captured.convention
    traced = arguments_with(convention, convention.traced, inputs)
    example = arguments_with(convention, captured.example, inputs)
    gone = frozenset(convention.traced.keys() - traced.keys())
    parameters = [p for name, p in convention.signature.parameters.items() if name not in gone]
    signature = inspect.Signature(parameters)
    in_spec = flatten(split(signature, traced), convention.caches)[1]
    out_spec = spec_with(convention.out_spec, outputs)
    if out_spec is None:
        raise Kept("nothing would be returned")
    now = replace(convention, signature=signature, traced=traced, in_spec=in_spec, out_spec=out_spec)
    return replace(captured, convention=now, example=example, gone=captured.gone | gone)


def refusal(captured: Captured, inputs: Mapping[int, Remake], outputs: Mapping[int, int]) -> Refusal | None:
    try:
        changed(captured, inputs, outputs)
    except Kept as reason:
        return Refusal(str(reason))
    return None


def nothing(leaf: Any) -> list[Any]:
    return []


def arguments_with(convention: Convention, arguments: Arguments, remake: Mapping[int, Remake]) -> Arguments:
    """The arguments by name; those of which nothing is left are absent."""
    left, at = {}, 0
    for name in in_order(convention.signature, arguments):
        leaves, spec = flatten(arguments[name], convention.caches)
        made = {i: remake[at + i](leaf) for i, leaf in enumerate(leaves) if at + i in remake}
        counts = with_counts(spec, {i: len(x) for i, x in made.items()})
        at += len(leaves)
        now = spec_with(spec, counts)
        if now is not None:
            kept = [made.get(i, [leaf]) if counts.get(i, 1) else [] for i, leaf in enumerate(leaves)]
            left[name] = unflatten([x for some in kept for x in some], now, convention.caches)
    return {name: left[name] for name in arguments if name in left}


def in_order(signature: inspect.Signature, arguments: Arguments) -> list[str]:
    """The names of the arguments in the order of their leaves: by position, then by keyword."""
    several = inspect.Parameter.VAR_POSITIONAL
    kinds = {name: p.kind for name, p in signature.parameters.items()}
    args, kwargs = split(signature, {n: [n] if kinds.get(n) is several else n for n in arguments})
    return [*args, *kwargs.values()]


def with_counts(spec: pytree.TreeSpec, counts: Mapping[int, int]) -> dict[int, int]:
    """With what goes beside: a layer of a cache that loses its keys loses its count of tokens."""
    more = dict(counts)

    def visit(part: pytree.TreeSpec, at: int) -> int:
        if part.is_leaf():
            return at + 1
        starts = []
        for child in part.children():
            starts.append(at)
            at = visit(child, at)
        if is_cache(part):
            _, layout = part.context
            counted = [i for i, window in enumerate(layout) if window is not None]
            for place, layer in enumerate(counted if len(starts) > 2 else ()):
                more.update({starts[2] + place: 0} if counts.get(starts[0] + layer) == 0 else {})
        return at

    visit(spec, 0)
    return more


def spec_with(spec: pytree.TreeSpec, counts: Mapping[int, int]) -> pytree.TreeSpec | None:
    """The tree with so many leaves in place of one; None where nothing is left of it. Raises Kept."""
    return rebuilt(spec, iter(range(spec.num_leaves)), with_counts(spec, counts))


def rebuilt(spec: pytree.TreeSpec, numbers: Iterator[int], counts: Mapping[int, int]) -> pytree.TreeSpec | None:
    if spec.is_leaf():
        count = counts.get(next(numbers), 1)
        return spec if count == 1 else pytree.TreeSpec(tuple, None, [spec] * count) if count else None
    if is_cache(spec):
        return rebuilt_cache(spec, numbers, counts)
    parts = [rebuilt(child, numbers, counts) for child in spec.children()]
    kept = [part for part in parts if part is not None]
    if len(kept) == len(parts) or spec.type in (tuple, list):
        return pytree.TreeSpec(spec.type, spec.context, kept) if kept or not parts else None
    if isinstance(spec.context, list) and len(spec.context) == len(parts):  # a dict or an output of transformers: its keys
        keys = [key for key, part in zip(spec.context, parts, strict=True) if part is not None]
        return pytree.TreeSpec(spec.type, keys, kept) if kept else None
    raise Kept(f"a {spec.type.__name__} cannot lose one of its elements")


def is_cache(spec: pytree.TreeSpec) -> bool:
    context = spec.context
    return isinstance(context, list) and len(context) == 2 and isinstance(context[0], list) and KEYS in context[0]


def rebuilt_cache(spec: pytree.TreeSpec, numbers: Iterator[int], counts: Mapping[int, int]) -> pytree.TreeSpec | None:
    """Keys, values and counts by layer, and the windows of the layers that are left."""
    names, layout = spec.context
    found = [[counts.get(next(numbers), 1) for _ in child.children()] for child in spec.children()]
    if any(count > 1 for child in found for count in child):
        raise Kept(
            f"a {spec.type.__name__} holds one tensor of keys and one of values for each layer, no codes with their scales"
        )
    kept = [[i for i, count in enumerate(child) if count] for child in found]
    lists = [pytree.TreeSpec(list, None, [c.children()[i] for i in left]) for c, left in zip(spec.children(), kept, strict=True)]
    if [x.num_leaves for x in lists] == [x.num_leaves for x in spec.children()]:
        return spec
    if kept[0] != kept[1] or spec.children()[0].num_leaves != len(layout):
        raise Kept(f"a {spec.type.__name__} loses a layer only with its keys and its values")
    return pytree.TreeSpec(spec.type, [names, [layout[i] for i in kept[0]]], lists) if kept[0] else None
