"""The quantisers of others, on the same models: onnxruntime's and torchao's.

quantize_dynamic(model.onnx)          int8 weights and inputs, of every MatMul, and of embeddings
MatMulNBitsQuantizer(model.onnx)      weights in blocks of 4 or 8 bits: round-to-nearest, HQQ; its GPTQ needs neural-compressor
torchao.quantize_(model, …)           weight-only int8 and int4, dynamic int8, on the torch module
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import (
    GPTQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from torch import Tensor

from quantize.subjects import Batch, Subject

Run = Callable[[Batch], list[Tensor]]


def dynamic(subject: Subject, per_channel: bool) -> Path:
    path = subject.folder / f"{subject.name}-dynamic{'-channel' * per_channel}.onnx"
    logging.getLogger().setLevel(logging.ERROR)
    quantize_dynamic(subject.path, path, per_channel=per_channel)
    return path


def blocks(subject: Subject, bits: int, group: int, algorithm: str) -> Path:
    """Raises ImportError where the algorithm needs a package that is not here."""
    path = subject.folder / f"{subject.name}-{algorithm}{bits}-{group}.onnx"
    model = onnx.load(subject.path)
    if algorithm == "rtn":
        made = MatMulNBitsQuantizer(model, bits=bits, block_size=group, is_symmetric=True, accuracy_level=4)
    elif algorithm == "hqq":
        config = HQQWeightOnlyQuantConfig(block_size=group, bits=bits)
        made = MatMulNBitsQuantizer(model, bits=bits, block_size=group, is_symmetric=False, algo_config=config)
    else:
        import neural_compressor  # noqa: F401

        made = MatMulNBitsQuantizer(model, bits=bits, block_size=group, algo_config=GPTQWeightOnlyQuantConfig(block_size=group))
    made.process()
    onnx.save(made.model.model, path)
    return path


def torchao(subject: Subject, kind: str) -> Run:
    """Raises ImportError without torchao, and whatever torchao raises on this machine."""
    importlib.metadata.version("torchao")
    from torchao.quantization import (
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    configs = {
        "int8 weight-only": Int8WeightOnlyConfig,
        "int8 dynamic": Int8DynamicActivationInt8WeightConfig,
        "int4 weight-only": lambda: Int4WeightOnlyConfig(group_size=32),
    }
    model = copy.deepcopy(subject.model)
    quantize_(model, configs[kind]())

    def run(batch: Batch) -> list[Tensor]:
        with torch.no_grad():
            return [model(**batch)]

    run(subject.judged[0])
    return run
