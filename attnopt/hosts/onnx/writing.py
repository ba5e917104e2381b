"""From onnx-ir to a file: written beside its place, then moved there, so that no half file is ever left."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from attnopt.errors import OutputNotWritable

LIMIT = 1_800_000_000  # protobuf holds 2 GB; the rest is for the graph


def size_of_weights(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def is_external(model: ir.Model) -> bool:
    """Whether the weights must or did live in a file of their own."""
    held = (v.const_value for v in model.graph.initializers.values())
    return any(isinstance(t, ir.ExternalTensor) for t in held) or size_of_weights(model) > LIMIT


def write(model: ir.Model, path: Path, metadata: Mapping[str, str]) -> None:
    """Write `path` (and `path`.data where weights are external). Raises OutputNotWritable; nothing is left behind then."""
    if not path.parent.is_dir():
        raise OutputNotWritable(f"there is no folder '{path.parent}'", next_move="Make it, or choose another place.")
    if path.is_dir():
        raise OutputNotWritable(f"'{path}' is a folder", next_move="Give the name of a file.")
    known = dict(model.metadata_props)
    model.metadata_props.update(metadata)
    beside: Path | None = None
    try:
        beside = Path(tempfile.mkdtemp(prefix=f".{path.stem}", dir=path.parent))
        data = f"{path.name}.data" if is_external(model) else None
        ir.save(model, beside / path.name, external_data=data)
        if data is not None and (beside / data).exists():
            stale = let_go(model, path.parent / data)
            os.replace(beside / data, path.parent / data)
            for tensor in stale:
                tensor.invalidate()
        os.replace(beside / path.name, path)
    except OSError as failure:
        reason = failure.strerror or str(failure)
        raise OutputNotWritable(f"'{path}' cannot be written: {reason}", next_move="Choose another place.") from None
    finally:
        model.metadata_props.clear()
        model.metadata_props.update(known)
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def let_go(model: ir.Model, data: Path) -> list[ir.ExternalTensor]:
    """Have the model read what it reads from this file through a mapping, which keeps the old content alive.

    Returns the tensors that were replaced: once the file is another one, whoever else holds them must not read on.
    """
    stale = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and data.exists() and os.path.samefile(tensor.path, data):
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
            stale.append(tensor)
    return stale
