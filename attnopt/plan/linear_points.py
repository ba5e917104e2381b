"""A linear layer at one shape as a call that can be timed: in float32 or int8, on torch or onnxruntime.

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

LINEARS = ("linear", "linear-int8", "ort-linear", "ort-linear-int8")
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
        narrow, runtime = self.kernel.endswith("int8"), "onnxruntime" if self.kernel.startswith("ort-") else "torch"
        return linear_phases(self.rows, self.inputs, self.outputs, "float32", "int8" if narrow else "", runtime)

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
    run, name = host.runner(), host.graph.inputs[0].name
    return lambda x: run({name: x})


def linear_points() -> list[LinearPoint]:
    """One fixed list: every kernel at shapes that take under some milliseconds; those of one layer one after the other."""
    sizes = [(rows, n, m) for n, m in LAYERS for rows in ROWS if rows * n * m <= 2**27]
    return [LinearPoint(kernel, rows, n, m) for rows, n, m in sizes for kernel in LINEARS]
