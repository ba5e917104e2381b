"""FlexAttention as its users write it: mask and score modifications as functions, a block mask made before the clock runs, compiled.

On a CPU it runs uncompiled: the clock means nothing there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gpu.case import SOFTCAP, Case, Data

Modification = Callable[..., Tensor]


def mask_of(case: Case, data: Data) -> Modification | None:
    """The visible pairs; `causal` stands in all of them but `full`."""
    if case.mask == "full":
        return None
    if case.mask == "window":
        return lambda b, h, q, k: (q >= k) & (q - k < case.window)
    if case.mask == "documents":
        document = data.operands["document"]
        return lambda b, h, q, k: (q >= k) & (document[b, q] == document[b, k])
    return lambda b, h, q, k: q >= k


def score_of(case: Case, data: Data) -> Modification | None:
    if case.mask == "softcap":
        return lambda score, b, h, q, k: SOFTCAP * torch.tanh(score / SOFTCAP)
    if case.mask == "alibi":
        slopes = data.operands["slopes"]
        return lambda score, b, h, q, k: score + slopes[h] * (k - q)
    return None


def flex(case: Case, data: Data) -> Callable[[], Tensor]:
    mask, score, device = mask_of(case, data), score_of(case, data), data.q.device
    batch = case.batch if case.mask == "documents" else None
    blocks = None if mask is None else create_block_mask(mask, batch, None, case.q_len, case.kv_len, device=str(device))
    attend = flex_attention
    if device.type == "cuda":
        torch._dynamo.reset()  # one code object is compiled for a few shapes only, and there is a row for each
        attend = torch.compile(flex_attention, dynamic=False)
    options = {"scale": case.width**-0.5, "enable_gqa": case.heads != case.key_heads}
    return lambda: attend(data.q, data.k, data.v, score_mod=score, block_mask=blocks, **options)
