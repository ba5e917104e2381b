"""attnopt::flex_attention: a spec run by torch's compiled FlexAttention, as one operator that export can save.

    flex_attention(q, k, v, [bias0], "softmax scale(0.1) softcap(50.0) add(load(bias0, 0, h, row, k)) causal")

The score modification is generated source. Masks that read no data become a block mask, built once per shape; masks that read
data are applied to the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from attnopt.ir.expr import Expr
from attnopt.ir.spec import parse
from attnopt.runtime.flex_source import attend_source, mask_source, split_mask


@lru_cache(maxsize=256)
def defined(source: str) -> Any:
    """The function that a piece of generated source defines."""
    space = {"torch": torch, "flex_attention": flex_attention}
    exec(compile(source, f"<attnopt {hash(source):x}>", "exec"), space)
    return next(value for name, value in space.items() if name in ("attend", "mask_mod"))


@lru_cache(maxsize=64)
def block_mask(mask: Expr, q_len: int, kv_len: int, device: str) -> BlockMask:
    """Which blocks a mask without operands leaves; shared by all calls of the same shape."""
    return create_block_mask(defined(mask_source(mask)), None, None, q_len, kv_len, device=device)


@lru_cache(maxsize=256)
def compiled(spec: str) -> tuple[Callable[..., Tensor], Expr | None]:
    """The spec as a compiled function, and the part of its mask that becomes a block mask."""
    parsed = parse(spec)
    return torch.compile(defined(attend_source(parsed)), dynamic=True), split_mask(parsed)[0]


def run_flex(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], spec: str) -> Tensor:
    """q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E] -> [B, H, Q, E]; tensors in the order of `parse(spec).operands`."""
    attend, static = compiled(spec)
    blocks = None if static is None else block_mask(static, q.shape[2], k.shape[2], str(q.device))
    return attend(q, k, v, blocks, *tensors)


@torch.library.custom_op("attnopt::flex_attention", mutates_args=())
def flex_operator(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    """See `run_flex`. Inference only: no gradient is defined."""
    return run_flex(q, k, v, operands, spec).contiguous()


@flex_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))
