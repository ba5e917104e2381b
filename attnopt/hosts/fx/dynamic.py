"""Which dimensions of the inputs may vary: batch and sequence length by default.

    {"input_ids": [2, 16], "attention_mask": [2, 16]}   ->   {"input_ids": {0: batch, 1: sequence}, "attention_mask": the same}

Dimensions that must be equal share one name. The first proposal names batch and sequence; where torch.export finds that a
model does not allow it, the next lets torch decide every dimension on its own, and the last keeps all sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.utils import _pytree as pytree

TOKENS = (torch.int64, torch.int32, torch.bool)


def proposals(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(what it is, dynamic_shapes) from the most to the least general."""
    yield "batch and sequence", tree_of(arguments, named_dims(arguments))
    yield "whatever torch.export allows", tree_of(arguments, automatic_dims(arguments))
    yield "none", tree_of(arguments, {})


def tree_of(arguments: Mapping[str, Any], dims: Mapping[int, dict[int, Any]]) -> Any:
    """`dims` (by position of the leaf) as a tree of the same form as the arguments."""
    leaves, spec = pytree.tree_flatten(dict(arguments))
    return shapes_tree([dims.get(i) if isinstance(leaf, Tensor) else None for i, leaf in enumerate(leaves)], spec)


def shapes_tree(leaves: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """The leaves as torch.export wants dynamic shapes: what is no plain container (a cache) becomes the list of its children."""
    remaining = iter(leaves)

    def build(part: pytree.TreeSpec) -> Any:
        if part.is_leaf():
            return next(remaining)
        children = [build(child) for child in part.children()]
        return (
            pytree.SUPPORTED_NODES[part.type].unflatten_fn(children, part.context)
            if part.type in pytree.BUILTIN_TYPES
            else children
        )

    return build(spec)


def named_leaves(arguments: Mapping[str, Any]) -> Iterator[tuple[int, str, Tensor]]:
    position = 0
    for name, value in arguments.items():
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                yield position, name, leaf
            position += 1


def is_sequence(leaf: Tensor) -> bool:
    """Whether dimension 1 counts tokens: ids and masks of rank 2, embeddings of rank 3."""
    return (leaf.ndim == 2 and (leaf.dtype in TOKENS or leaf.shape[1] > 1)) or leaf.ndim == 3


def is_cached(leaf: Tensor) -> bool:
    """Whether this, in a cache, is one layer's keys or values [B, Hk, K, D]: dimension 2 counts tokens."""
    return leaf.ndim == 4 and leaf.is_floating_point()


def cached_leaves(arguments: Mapping[str, Any]) -> frozenset[int]:
    """Positions of the leaves that are keys or values of past tokens.

    By name (past_key_values), or, beside an input of one token, in pairs of equal batch, heads and length: a decoding step that takes
    its cache as plain tensors, whatever they are called.
    """
    tensors = list(named_leaves(arguments))
    ranked = [(i, t.shape[:3], "past" in name) for i, name, t in tensors if is_cached(t)]
    named = frozenset(i for i, _, says in ranked if says)
    if named or not any(is_sequence(t) and t.shape[1] == 1 for _, _, t in tensors):
        return named
    shapes = Counter(shape for _, shape, _ in ranked)
    return frozenset(i for i, shape, _ in ranked if shapes[shape] > 1)


def named_dims(arguments: Mapping[str, Any]) -> dict[int, dict[int, Any]]:
    """One `batch` for all first dimensions of the common size; one sequence name per size and side (encoder, decoder)."""
    tensors = [(i, name, t) for i, name, t in named_leaves(arguments) if t.ndim >= 1]
    if not tensors:
        return {}
    batch_size = tensors[0][2].shape[0]
    batch = Dim("batch")
    cached = cached_leaves(arguments)
    sequences: dict[tuple[str, int], Any] = {}
    past: dict[int, Any] = {}
    dims: dict[int, dict[int, Any]] = {}
    for i, name, leaf in tensors:
        dims[i] = {0: batch} if leaf.shape[0] == batch_size and leaf.ndim >= 2 else {}
        side = "decoder_" if name.startswith("decoder_") else ""
        if is_sequence(leaf) and leaf.shape[1] > 1:
            key = (side, leaf.shape[1])
            if key not in sequences:
                sequences[key] = Dim(f"{side}sequence" + (f"_{len(sequences)}" if any(k[0] == side for k in sequences) else ""))
            dims[i][1] = sequences[key]
        elif i in cached:
            dims[i][2] = past.setdefault(leaf.shape[2], Dim("past" + (f"_{len(past)}" if past else "")))
        elif leaf.ndim == 4 and leaf.shape[1] == 1:  # a mask [batch, 1, queries, keys]
            for axis in (2, 3):
                if (side, leaf.shape[axis]) in sequences:
                    dims[i][axis] = sequences[(side, leaf.shape[axis])]
    if past:  # a mask over past and present keys is as long as both together, which no name can say
        for i, _, leaf in tensors:
            if is_sequence(leaf) and leaf.shape[1] > min(past):
                dims[i][1] = Dim.AUTO
    return dims


def automatic_dims(arguments: Mapping[str, Any]) -> dict[int, dict[int, Any]]:
    return {i: dict.fromkeys(range(t.ndim), Dim.AUTO) for i, _, t in named_leaves(arguments)}


def enlarged(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with batch and sequence of at least two: torch.export treats sizes 0 and 1 as fixed.

    A model that is given a cache keeps its sequence: a step of one token is what it is for.
    """
    tensors = list(named_leaves(arguments))
    batch = {t.shape[0] for _, _, t in tensors if t.ndim >= 2}
    short = not cached_leaves(arguments) and any(is_sequence(t) and t.shape[1] == 1 for _, _, t in tensors)

    def grown(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim < 2:
            return leaf
        if batch == {1}:
            leaf = leaf.repeat_interleave(2, 0)
        if short and is_sequence(leaf) and leaf.shape[1] == 1:
            leaf = leaf.repeat_interleave(2, 1)
        return leaf

    return {name: pytree.tree_map(grown, value) for name, value in arguments.items()}
