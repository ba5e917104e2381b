"""Inputs made up from what an ONNX model says of them: valid token ids, masks of ones, positions that count."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.ir.dims import Dim, computed, parts
from attnopt.ir.graph import Graph, Value

BATCH, LENGTH = 2, 16


def example_inputs(graph: Graph) -> dict[str, Tensor]:
    """One tensor per input. The same symbol has the same size everywhere; floats come from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    sizes: dict[str, int] = {}
    return {value.name: made(value, graph, sizes, generator) for value in graph.inputs}


def made(value: Value, graph: Graph, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
    shape = [chosen(dim, axis, sizes) for axis, dim in enumerate(value.shape or ())]
    dtype = getattr(torch, value.dtype or "float32")
    name = value.name.lower()
    if dtype == torch.bool or "mask" in name:
        return torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if "position" in name and shape:
        return torch.arange(shape[-1], dtype=dtype).expand(shape).contiguous()
    limit = min((rows for rows in table_rows(value)), default=2 if "type" in name else 10)
    return torch.randint(0, max(limit, 1), shape, generator=generator).to(dtype)


def table_rows(value: Value) -> Sequence[int]:
    """Sizes of the tables that this value indexes: token ids must stay below."""
    rows = []
    for node in value.users:
        table = node.inputs[0]
        if node.op == "gather" and table is not None and table is not value and table.shape and isinstance(table.shape[0], int):
            rows.append(table.shape[node.attrs["axis"]])
    return rows  # type: ignore[return-value]


def chosen(dim: Dim, axis: int, sizes: dict[str, int]) -> int:
    """A size for a dimension: never 0 or 1, which hide mistakes; the first axis is a batch."""
    coefficient, names = parts(dim)
    return math.prod((size_of(name, axis, sizes) for name in names), start=coefficient)


def size_of(name: str, axis: int, sizes: dict[str, int]) -> int:
    """The size of a symbol; one that is named by a sum, such as past + length, is computed from its terms."""
    if name not in sizes:
        computed = computed_size(name, axis, sizes)
        lowered = name.lower()
        batch = "batch" in lowered or (axis == 0 and not any(word in lowered for word in ("seq", "len")))
        sizes[name] = computed if computed is not None else BATCH if batch else LENGTH
    return sizes[name]


def computed_size(name: str, axis: int, sizes: dict[str, int]) -> int | None:
    """The value of a symbol that is named by a sum of others; None for anything else."""
    try:
        found = computed(name, lambda other: size_of(other, axis, sizes))
    except KeyError:
        return None
    return found if found > 0 else None
