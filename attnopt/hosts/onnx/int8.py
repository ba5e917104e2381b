"""Linear layers on int8 weights by onnxruntime's own dynamic quantiser.

MatMul(x, W)   ->   DynamicQuantizeLinear(x), MatMulInteger(…, W_int8), scale          which onnxruntime runs as one kernel
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from attnopt.hosts.onnx.writing import LIMIT, size_of_weights


def quantize(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A model in which the named MatMul and Gemm nodes are int8: weights symmetric, one scale per output channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # the quantiser advises to pre-process models that need none
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "quantized.onnx"
        large = size_of_weights(model) > LIMIT
        source: object = ir.to_proto(model)
        if large:
            source = Path(folder) / "source.onnx"
            ir.save(model, source, external_data="source.data")  # type: ignore[arg-type]
        try:
            quantize_dynamic(
                source,  # type: ignore[arg-type]
                target,
                per_channel=True,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=[*names, *(f"{name}_MatMul" for name in names)],  # how it renames a Gemm that it splits
                use_external_data_format=large,
                extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True},
            )
        finally:
            logger.setLevel(level)
        return ir.serde.deserialize_model(onnx.load(target))
