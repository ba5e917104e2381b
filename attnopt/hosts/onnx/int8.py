"""Linear layers on int8 weights by onnxruntime's own dynamic quantiser.

MatMul(x, W)   ->   DynamicQuantizeLinear(x), MatMulInteger(…, W_int8), scale       which onnxruntime runs as one kernel
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from attnopt.hosts.onnx.places import Names
from attnopt.hosts.onnx.writing import LIMIT, size_of_weights


def quantize(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A model in which the named MatMul and Gemm nodes are int8: weights symmetric, one scale per output channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = model.clone()
    own_weights(model, set(names))
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
                nodes_to_quantize=[
                    *names,
                    *(f"{name}_MatMul" for name in names),
                ],  # how it renames a Gemm that it splits
                use_external_data_format=large,
                extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True},
            )
        finally:
            logger.setLevel(level)
        return ir.serde.deserialize_model(onnx.load(target))


def own_weights(model: ir.Model, names: set[str]) -> None:
    """Give the named nodes weights that no other node reads: the quantiser would round those for the others as well.

    layer(x, W), other(y, W)   ->   layer(x, W_int8), other(y, W)       the data is shared
    """
    taken = Names([*model.graph.initializers, *(v.name or "" for node in model.graph for v in node.outputs)])
    for name, held in list(model.graph.initializers.items()):
        chosen = [(node, i) for node, i in held.uses() if node.name in names]
        if not chosen or (len(chosen) == len(held.uses()) and not held.is_graph_output()):
            continue
        own = ir.Value(name=taken.unique(f"{name}_own"), shape=held.shape, type=held.type, const_value=held.const_value)
        model.graph.register_initializer(own)
        for node, i in chosen:
            node.replace_input_with(i, own)
