"""Inputs made up from what an ONNX model says of them: valid token ids, masks of ones, positions that count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnopt.ir.dims import Dim, parts
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
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype == torch.bool or "mask" in name:
        return torch.ones(shape, dtype=dtype)
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
    if isinstance(dim, int):
        return dim
    coefficient, names = parts(dim)
    total = coefficient
    for name in names:
        lowered = name.lower()
        batch = "batch" in lowered or (axis == 0 and not any(word in lowered for word in ("seq", "len")))
        total *= sizes.setdefault(name, BATCH if batch else LENGTH)
    return total


def as_mapping(names: Sequence[str], inputs: object) -> Mapping[str, object]:
    """A user's inputs by name: a dict as it is, a tuple or single tensor in the order of the model's inputs."""
    if isinstance(inputs, Mapping):
        return inputs
    given = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    return dict(zip(names, given, strict=False)) | {f"input {i}": x for i, x in enumerate(given) if i >= len(names)}
