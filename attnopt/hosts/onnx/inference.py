"""A first estimate of all shapes and types by ONNX's own inference, on a copy without the weights' data."""

from __future__ import annotations

import logging

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass


def infer(model: ir.Model) -> None:
    """Fill in shapes and types that the exporter left out; the model is left as it is where inference fails."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    finally:
        logger.setLevel(level)


def needs_inference(model: ir.Model) -> bool:
    return any(v.shape is None or v.dtype is None for node in model.graph.all_nodes() for v in node.outputs if v.name)
