"""A linear layer at one shape as a call that can be timed: in float32, int8 or a format of narrow weights, on torch or onnxruntime.

LinearPoint("ort-linear-int8", rows=128, inputs=384, outputs=1536)   ->   a callable
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from attnopt.cost.estimate import linear_phases
from attnopt.cost.phase import Phase
from attnopt.hosts.fx import FxHost
from attnopt.hosts.onnx import OnnxHost
from attnopt.hosts.single_linear import single_linear
from attnopt.passes.edits.layers.linear_layers import matrix
from attnopt.rounding.grids import Gridding
from attnopt.rounding.weight_format import WeightFormat

LINEARS = ("linear", "linear-int8", "ort-linear", "ort-linear-int8", "linear-whole", "ort-linear-8bits", "ort-linear-4bits")
STORED = {"linear-whole": "int4 group 32", "ort-linear-8bits": "int8 group 128", "ort-linear-4bits": "int4 group 32"}
LAYERS = ((384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (1024, 1024), (512, 2048), (2048, 512), (256, 688))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class LinearPoint:
    kernel: str
    rows: int
    inputs: int
    outputs: int

    @property
    def passes(self) -> list[Phase]:
        runtime = "onnxruntime" if self.kernel.startswith("ort-") else "torch"
        stored = STORED.get(self.kernel, "int8" if self.kernel.endswith("int8") else "")
        return linear_phases(self.rows, self.inputs, self.outputs, "float32", stored, runtime)

    def call(self) -> Callable[[], object]:
        run = runner(self.kernel, self.inputs, self.outputs)
        data = torch.randn(self.rows, self.inputs, generator=torch.Generator().manual_seed(self.rows))
        return lambda: run(data)


@lru_cache(maxsize=8)
def runner(kernel: str, inputs: int, outputs: int) -> Callable[..., object]:
    host: FxHost | OnnxHost = single_linear("onnx" if kernel.startswith("ort-") else "torch", inputs, outputs)
    if kernel.endswith("int8"):
        host = host.copy()
        host.quantize_linears(list(host.graph.of("linear", "matmul")))
        host.finish()
    elif kernel in STORED:
        host, format = host.copy(), WeightFormat.read(STORED[kernel])
        assert format is not None
        host.store_rounded({n.name: Gridding("extremes").rounded(matrix(n), format) for n in host.graph.of("linear", "matmul")})
        host.finish()
    run, name = host.runner(), host.graph.inputs[0].name
    return lambda x: run({name: x})


def linear_points() -> list[LinearPoint]:
    """One fixed list: every kernel at shapes that take under some milliseconds; those of one layer one after the other."""
    sizes = [(rows, n, m) for n, m in LAYERS for rows in ROWS if rows * n * m <= 2**27]
    return [LinearPoint(kernel, rows, n, m) for rows, n, m in sizes for kernel in LINEARS]
