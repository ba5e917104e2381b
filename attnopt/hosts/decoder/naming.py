"""Names that runners of ONNX decoders know: past_key_values.N.key, present.N.value, and sizes that say what they count.

past_key_values_0_0 [batch, 2, past, 64]   ->   past_key_values.0.key [batch, 2, past, 64]
output_1_0_0 [batch, 2, s5 + 1, 64]        ->   present.0.key [batch, 2, past + 1, 64]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PAST, PRESENT, PARTS = "past_key_values", "present", ("key", "value")


def named(proto: Any, layers: int, *, decodes: bool) -> Any:
    """The model with names for all that its graph takes and returns. decodes: it takes a past, of length `past`."""
    import onnx_ir

    model = onnx_ir.from_proto(proto)
    graph = model.graph
    plain = [value for value in graph.inputs if PAST not in str(value.name)]
    rename(graph.inputs, [*(str(v.name) for v in plain), *(pairs(PAST, layers) if decodes else ())])
    rename(graph.outputs, ["logits", *pairs(PRESENT, layers)])
    total = "past + 1" if decodes else "sequence"
    for value in (*graph.inputs, *graph.outputs):
        sized(value, total if value.name == "attention_mask" or str(value.name).startswith(PRESENT) else "past", decodes)
    return onnx_ir.to_proto(model)


def pairs(name: str, layers: int) -> list[str]:
    return [f"{name}.{layer}.{part}" for layer in range(layers) for part in PARTS]


def rename(values: Sequence[Any], names: Sequence[str]) -> None:
    for value, name in zip(values, names, strict=True):
        value.name = name


def sized(value: Any, length: str, decodes: bool) -> None:
    """The length that a value has, where it is open: dimension 2 of keys and values, 1 of all else. Dimension 0 is the batch."""
    import onnx_ir

    cached = str(value.name).startswith((PAST, PRESENT))
    axis, name = (2, length) if cached else (1, "sequence" if value.name != "attention_mask" else length)
    dims = list(value.shape)
    open_ = [isinstance(d, onnx_ir.SymbolicDim) for d in dims]
    dims = [
        ("batch" if i == 0 else name if i == axis else d) if free else d
        for i, (d, free) in enumerate(zip(dims, open_, strict=True))
    ]
    value.shape = onnx_ir.Shape(dims)
