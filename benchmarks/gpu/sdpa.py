"""torch's scaled_dot_product_attention with one backend at a time, and its flash kernel for packed lengths.

Masks that are no plain causal one, and ALiBi, are given as a tensor, which is made before the clock runs; a soft cap cannot be given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.spec import parse
from gpu.case import Case, Data

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LARGEST = 8 << 30  # bytes of a mask tensor


class NotSaid(Exception):
    """Why a contender cannot compute a case."""


def sdpa(backend: str, case: Case, data: Data) -> Callable[[], Tensor]:
    added, causal = mask_tensor(case, data), case.mask == "causal"
    options = {"scale": case.width**-0.5, "enable_gqa": case.heads != case.key_heads}

    def call() -> Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            return F.scaled_dot_product_attention(data.q, data.k, data.v, attn_mask=added, is_causal=causal, **options)

    return call


def mask_tensor(case: Case, data: Data) -> Tensor | None:
    """Bool [B|1, 1, Q, K], or what is added to the scores in their dtype [1, H, Q, K]; None where there is nothing to give."""
    if case.mask in ("full", "causal"):
        return None
    if case.mask == "softcap":
        raise NotSaid("has no soft cap")
    spec = parse(case.spec)
    batch, heads = case.batch if case.mask == "documents" else 1, case.heads if case.mask == "alibi" else 1
    size = batch * heads * case.q_len * case.kv_len * data.q.element_size()
    if size > LARGEST:
        raise NotSaid(f"its mask takes {size / 2**30:.0f} GiB")
    grid = Grid(batch, heads, case.q_len, case.kv_len, device=data.q.device)
    visible = evaluate(spec.mask, grid, data.operands).bool()
    if not spec.biases:
        return visible
    bias = evaluate(spec.biases[0], grid, data.operands).to(data.q.dtype)
    return torch.where(visible, bias, torch.full((), -torch.inf, dtype=bias.dtype, device=bias.device))


def varlen(case: Case, data: Data) -> Callable[[], Tensor]:
    """Flash over documents that lie one after the other, or over the whole text with a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as failure:
        raise NotSaid("this torch has no varlen_attn") from failure
    rows, starts, longest = data.rows, data.starts, max(data.lengths)
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, object] = {"scale": case.width**-0.5} if "scale" in known else {}
    if "window_size" in known:
        options["window_size"] = (-1 if case.mask == "documents" else case.window - 1, 0)
    elif case.mask == "documents":
        options["is_causal"] = True
    else:
        raise NotSaid("this torch's varlen_attn has no windows")

    def call() -> Tensor:
        out = varlen_attn(*rows, starts, starts, longest, longest, **options)
        return out.unflatten(0, (case.batch, -1)).transpose(1, 2)

    return call
