"""Kernels that the ecosystem already has: torch's scaled_dot_product_attention and FlexAttention, ONNX and onnxruntime operators."""
