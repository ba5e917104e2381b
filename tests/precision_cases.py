"""The cases of the prefill family with rounded products: its kernel in the interpreter and its eager twin take the same table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = "q_group=row // 32 * 8 + row % 8, k_group=k // 64 * 4 + k % 8 // 2"
FP8 = "p=fp8, v=fp8, v_axis=channel, block=64"
INT8 = f"q=int8, k=int8, {GROUPS}, k_smooth=0"
SAGE = f"precision({INT8}, {FP8})"


@dataclass(frozen=True)
class Rounded:
    """heads, key heads; widths of keys and values; numbers of queries and keys."""

    spec: str
    heads: tuple[int, int] = (2, 1)
    width: tuple[int, int] = (64, 64)
    lengths: tuple[int, int] = (150, 150)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values with channels far from zero, as real ones have, float32."""
        (heads, shared), (q_len, kv_len), (width, value_width) = self.heads, self.lengths, self.width
        q, k, v = (
            torch.randn(1, heads, q_len, width),
            torch.randn(1, shared, kv_len, width),
            torch.randn(1, shared, kv_len, value_width),
        )
        return q, k + 2 * torch.randn(1, shared, 1, width), v + torch.randn(1, shared, 1, value_width)


TABLE = {
    "sage": Rounded(f"softmax scale(0.125) {SAGE}"),
    "sage_causal": Rounded(f"softmax scale(0.125) causal {SAGE}"),
    "int8_only": Rounded(f"softmax scale(0.125) causal precision({INT8})"),
    "fp8_only": Rounded(f"softmax scale(0.125) causal precision({FP8})"),
    "half_values": Rounded(f"softmax scale(0.125) causal precision({INT8}, p=fp16, v=fp16, v_smooth=0, block=64)"),
    "per_block": Rounded(f"softmax scale(0.125) precision(q=int8, k=int8, q_group=row // 128, k_group=k // 64, {FP8})", lengths=(40, 200)),
    "per_row": Rounded(f"softmax scale(0.125) causal precision(q=int8, k=int8, k_smooth=0, {FP8})", width=(32, 16)),
    "rest_of_a_row": Rounded(f"softmax scale(0.1) causal precision({INT8}, {FP8})", width=(80, 72), lengths=(70, 70)),
    "narrow": Rounded(f"softmax scale(0.25) precision({INT8}, {FP8})", width=(24, 20), lengths=(10, 33)),
    "all_smooth": Rounded(f"softmax scale(0.125) causal precision({INT8}, {FP8}, q_smooth=row // 128, v_smooth=0)"),
    "softcap": Rounded(f"softmax scale(0.125) softcap(3.0) causal precision({INT8}, {FP8}, q_smooth=row // 128)"),
    "bias": Rounded(f"softmax scale(0.125) add(0.1 * (k - q)) causal precision({INT8}, {FP8}, v_smooth=0)", heads=(4, 2), lengths=(40, 40)),
    "sink": Rounded(f"softmax scale(0.125) sink(0.5) causal precision({INT8}, {FP8}, v_smooth=0)", lengths=(70, 70)),
    "empty_rows": Rounded(f"softmax scale(0.125) k < q precision({INT8}, {FP8}, v_smooth=0)", lengths=(70, 70)),
    "zeros_of_empty_rows": Rounded(f"softmax scale(0.125) k < q empty(zero) precision({INT8}, {FP8}, v_smooth=0)", lengths=(70, 70)),
    "last_queries": Rounded(f"softmax scale(0.125) offset(size(k) - size(q)) causal precision({INT8}, {FP8})", lengths=(20, 150)),
}  # fmt: skip
