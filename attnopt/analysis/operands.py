"""What the host holds of a site, in the layout of the reference: q [B, Hq, Q, D], k [B, Hk, K, D], v [B, Hv, K, E], loads as read.

tapped [batch, length, heads * width]   ->   [batch, heads, length, width]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.dims import Dim, evaluate, solved
from attnopt.ir.graph import Value
from attnopt.ir.layout import Axis, Group, Operand
from attnopt.ir.site import Site


@dataclass(frozen=True, eq=False)
class Held:
    """One attention on one batch: its rows, the operands that its spec loads, and the sizes of the graph."""

    q: Tensor
    k: Tensor
    v: Tensor
    operands: Mapping[str, Tensor]
    sizes: Mapping[str, int]


def tapped(site: Site) -> tuple[Value, ...]:
    """The values that have to be tapped: those that are neither constants nor made of sizes."""
    operands = (site.q, site.k, site.v, *site.operands.values())
    return tuple(dict.fromkeys(o.value for o in operands if o.value.load is None and not made_of_sizes(o.value)))


def made_of_sizes(value: Value) -> bool:
    return value.sizes is not None and value.producer is None and value.handle is None


def held(site: Site, data: Mapping[Value, Tensor], sizes: Mapping[str, int]) -> Held:
    """The site on a batch. data: what was tapped. sizes: of the graph's symbols, as far as the inputs tell them."""
    known = dict(sizes)
    for value, tensor in data.items():
        for dim, size in zip(value.shape or (), tensor.shape, strict=False):
            if (found := solved(dim, int(size))) is not None:
                known.setdefault(*found)
    axes = site.axes
    heads = (*axes["g"], *axes["r"])
    lengths: dict[Axis, int] = {}
    for operand in (site.q, site.k, site.v):
        lengths |= axis_sizes(operand, tensor_of(operand.value, data, known), known, lengths)

    def rows(operand: Operand, row: str, width: str, group: Group) -> Tensor:
        shared = group if any(axis in operand.axes for axis in axes["r"]) else axes["g"]
        groups = (axes["b"], shared, axes[row], axes[width])
        return arranged(operand, tensor_of(operand.value, data, known), groups, lengths)

    loads = {name: tensor_of(operand.value, data, known) for name, operand in site.operands.items()}
    q, k, v = rows(site.q, "q", "d", heads), rows(site.k, "k", "d", heads), rows(site.v, "k", "e", heads)
    batch = max(x.shape[0] for x in (q, k, v))
    q, k, v = (x.expand(batch, *x.shape[1:]) for x in (q, k, v))
    return Held(q, k, v, loads, known)


def tensor_of(value: Value, data: Mapping[Value, Tensor], sizes: Mapping[str, int]) -> Tensor:
    if value.load is not None:
        return value.load()
    if made_of_sizes(value):
        return torch.tensor([evaluate(dim, sizes) for dim in value.sizes or ()]).reshape([int(d) for d in value.shape or ()])  # type: ignore[arg-type]
    return data[value]


def axis_sizes(operand: Operand, tensor: Tensor, sizes: Mapping[str, int], known: Mapping[Axis, int]) -> dict[Axis, int]:
    """The size of every axis; of several in one dimension at most one may be unknown, and is what the others leave."""
    found: dict[Axis, int] = dict(known)
    for group, whole in zip(operand.layout, tensor.shape, strict=True):
        left = int(whole)
        for axis in group:
            if (size := number(axis.size, sizes) if axis not in found else found[axis]) is not None:
                found[axis] = size
                left //= max(size, 1)
        for axis in group:
            found.setdefault(axis, left)
    return found


def number(dim: Dim, sizes: Mapping[str, int]) -> int | None:
    try:
        return evaluate(dim, sizes)
    except KeyError:
        return None


def arranged(operand: Operand, tensor: Tensor, groups: Sequence[Group], sizes: Mapping[Axis, int]) -> Tensor:
    """An operand with one dimension for each group; a group that it lacks has size 1, one that it has in part is repeated."""
    present = [axis for group in operand.layout for axis in group]
    apart = tensor.reshape([sizes[axis] for axis in present])
    wanted = [axis for group in groups for axis in group if axis in present]
    apart = apart.permute([present.index(axis) for axis in wanted])
    atoms = [axis for group in groups for axis in group]
    apart = apart.reshape([sizes[axis] if axis in present else 1 for axis in atoms])
    in_part = [any(axis in present for axis in group) for group in groups]
    repeated = [sizes[axis] if in_part[i] else 1 for i, group in enumerate(groups) for axis in group]
    made = apart.expand(repeated) if atoms else apart
    counts = [[sizes[axis] for axis in group] if in_part[i] else [] for i, group in enumerate(groups)]
    return made.reshape([torch.Size(count).numel() for count in counts])
