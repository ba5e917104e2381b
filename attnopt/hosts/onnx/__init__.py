"""The ONNX host: a model read by onnx-ir, run by onnxruntime."""

from __future__ import annotations

from attnopt.hosts.onnx.host import OnnxHost

__all__ = ["OnnxHost"]
