"""What a torch model takes and returns, changed with its graph: tensors that vanish from its arguments and results.

    forward(ids, past=DynamicCache of 8 layers) -> (logits, DynamicCache of 8)
        ->  without layer 3    forward(ids, past=DynamicCache of 7 layers) -> (logits, DynamicCache of 7)

A container keeps its class and loses the element; one that is left empty goes as well, up to a whole parameter. The layers of a
cache after a dropped one move up, which is their new number.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from dataclasses import replace

from torch.utils import _pytree as pytree

from attnopt.hosts.fx.caches import KEYS
from attnopt.hosts.fx.call import Arguments, Convention, split
from attnopt.hosts.fx.capture import Captured
from attnopt.hosts.fx.trees import flatten, unflatten
from attnopt.ir.site import Refusal


class Kept(Exception):
    """Internal: a container that cannot lose one of its elements."""


def without(captured: Captured, inputs: Collection[int], outputs: Collection[int]) -> Captured:
    """The calling convention and the example without these leaves (by position). Raises Kept."""
    convention = captured.convention
    traced = arguments_without(convention, convention.traced, inputs)
    example = arguments_without(convention, captured.example, inputs)
    gone = frozenset(convention.traced.keys() - traced.keys())
    parameters = [p for name, p in convention.signature.parameters.items() if name not in gone]
    signature = inspect.Signature(parameters)
    in_spec = flatten(split(signature, traced), convention.caches)[1]
    out_spec = spec_without(convention.out_spec, dropped_leaves(convention.out_spec, outputs))
    if out_spec is None:
        raise Kept("nothing would be returned")
    changed = replace(convention, signature=signature, traced=traced, in_spec=in_spec, out_spec=out_spec)
    return replace(captured, convention=changed, example=example, gone=captured.gone | gone)


def refusal(captured: Captured, inputs: Collection[int], outputs: Collection[int]) -> Refusal | None:
    try:
        without(captured, inputs, outputs)
    except Kept as reason:
        return Refusal(str(reason))
    return None


def arguments_without(convention: Convention, arguments: Arguments, dropped: Collection[int]) -> Arguments:
    """The arguments by name; those of which nothing is left are absent."""
    left, at = {}, 0
    for name in in_order(convention.signature, arguments):
        leaves, spec = flatten(arguments[name], convention.caches)
        here = dropped_leaves(spec, {i - at for i in dropped if 0 <= i - at < len(leaves)})
        at += len(leaves)
        smaller = spec_without(spec, here)
        if smaller is not None:
            left[name] = unflatten([x for i, x in enumerate(leaves) if i not in here], smaller, convention.caches)
    return {name: left[name] for name in arguments if name in left}


def in_order(signature: inspect.Signature, arguments: Arguments) -> list[str]:
    """The names of the arguments in the order of their leaves: by position, then by keyword."""
    several = inspect.Parameter.VAR_POSITIONAL
    kinds = {name: p.kind for name, p in signature.parameters.items()}
    args, kwargs = split(signature, {n: [n] if kinds.get(n) is several else n for n in arguments})
    return [*args, *kwargs.values()]


def dropped_leaves(spec: pytree.TreeSpec, dropped: Collection[int]) -> frozenset[int]:
    """With what goes beside: a layer of a cache that loses its keys loses its count of tokens."""
    more = set(dropped)

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
                more.update({starts[2] + place} if starts[0] + layer in dropped else ())
        return at

    visit(spec, 0)
    return frozenset(more)


def spec_without(spec: pytree.TreeSpec, dropped: Collection[int]) -> pytree.TreeSpec | None:
    """The tree without these leaves; None where nothing is left of it. Raises Kept."""
    numbers = iter(range(spec.num_leaves))
    return smaller(spec, numbers, dropped)


def smaller(spec: pytree.TreeSpec, numbers: Iterator[int], dropped: Collection[int]) -> pytree.TreeSpec | None:
    if spec.is_leaf():
        return None if next(numbers) in dropped else spec
    if is_cache(spec):
        return smaller_cache(spec, numbers, dropped)
    parts = [smaller(child, numbers, dropped) for child in spec.children()]
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


def smaller_cache(spec: pytree.TreeSpec, numbers: Iterator[int], dropped: Collection[int]) -> pytree.TreeSpec | None:
    """Keys, values and counts by layer, and the windows of the layers that are left."""
    names, layout = spec.context
    kept = [[i for i, _ in enumerate(child.children()) if next(numbers) not in dropped] for child in spec.children()]
    lists = [
        pytree.TreeSpec(list, None, [child.children()[i] for i in left])
        for child, left in zip(spec.children(), kept, strict=True)
    ]
    if [x.num_leaves for x in lists] == [x.num_leaves for x in spec.children()]:
        return spec
    if kept[0] != kept[1] or spec.children()[0].num_leaves != len(layout):
        raise Kept(f"a {spec.type.__name__} loses a layer only with its keys and its values")
    return pytree.TreeSpec(spec.type, [names, [layout[i] for i in kept[0]]], lists) if kept[0] else None
