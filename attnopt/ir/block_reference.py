"""The meaning of a block, in plain PyTorch: from what a projection reads to the rows of heads that the attention reads.

    x [B, L, in]  --projection-->  [B, L, H, D]  --norm, rotary, scale-->  [B, L, H, D]  --cache-->  [B, past + L, H, D]

The steps are those of `Block.streams`; tests compare the result with what the model computes. No other definition exists.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ir.block import Block, CacheUpdate, HeadNorm, Joined, Lift, Norm, Part, Projection, Rotary, Scale, Step
from attnopt.ir.layout import Axis, Group, Operand


def rows(
    block: Block,
    name: str,
    x: Tensor,
    *,
    positions: Tensor | None = None,
    past: Tensor | None = None,
    indices: Tensor | None = None,
) -> Tensor:
    """What the attention reads as q, k or v, [B, L, H, D], from the input x [B, L, in] of its projection.

    Where heads are joined from several layers, x is what the lowest of these read (`Projection.lowest`).

    positions [B | 1, L]: what the frequencies are multiplied by; row numbers where left out. past [B, P, H, D] and indices [L]: of
    the cache, where there is one.
    """
    made = x
    for step in block.streams[name]:
        made = computed(step, made, positions, past, indices)
    return made


def computed(step: Step, x: Tensor, positions: Tensor | None, past: Tensor | None, indices: Tensor | None) -> Tensor:
    if isinstance(step, Projection):
        return projected(step, x)
    if isinstance(step, HeadNorm):
        return head_norm(step, x)
    if isinstance(step, Rotary):
        return turned(step, x, torch.arange(x.shape[1])[None] if positions is None else positions)
    if isinstance(step, Scale):
        return x * step.factor
    if isinstance(step, Lift):
        return torch.einsum("blhr,hrd->blhd", x, step.up())
    if isinstance(step, Joined):
        return torch.cat([part_rows(part, x, positions, past, indices) for part in step.parts], -1)
    return cached(step, x, past, indices)


def part_rows(part: Part, x: Tensor, positions: Tensor | None, past: Tensor | None, indices: Tensor | None) -> Tensor:
    """The channels of one part [B, L, H, width], from what its lowest layer reads."""
    layer = next(step for step in part.steps if isinstance(step, Projection))
    made = x if layer.down is None else latent(layer, x)
    for step in part.steps:
        made = computed(step, made, positions, past, indices)
    return made


def latent(layer: Projection, x: Tensor) -> Tensor:
    """What the second layer of a low-rank pair reads, from what the first reads."""
    assert layer.down is not None
    if layer.down_cache is not None:
        raise ValueError("this block caches latents: give x as its up projection reads it")
    made = projected(layer.down, x).flatten(-2)
    return made if layer.down_norm is None else normed(layer.down_norm, made)


def projected(step: Projection, x: Tensor) -> Tensor:
    """x [..., in] -> [..., H, D]; for o, heads [..., H, D] -> [..., out]."""
    if step.reads:
        made = torch.einsum("...hd,hdo->...o", x, step.rows())
    else:
        made = torch.einsum("...i,hdi->...hd", x, step.rows())
    bias = step.bias_rows()
    return made if bias is None else made + bias


def normalized(norm: Norm, x: Tensor) -> Tensor:
    """x over its last dimension, without gain and bias."""
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=norm.eps)
    if norm.kind == "rms":
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    length = x.square().sum(-1, keepdim=True)
    return x / (length.sqrt().clamp(min=norm.eps) if norm.floor else (length + norm.eps).sqrt())


def normed(norm: Norm, x: Tensor) -> Tensor:
    """The whole norm of rows x [..., C]."""
    made, gain, offset = normalized(norm, x), norm.gain(), norm.offset()
    made = made if gain is None else made * gain
    return made if offset is None else made + offset


def head_norm(step: HeadNorm, x: Tensor) -> Tensor:
    """x [..., H, D], per head or over all heads; gain and bias of each channel."""
    made = normalized(step.norm, x if step.axis == "head" else x.flatten(-2)).reshape(x.shape)
    gain, offset = step.norm.gain(), step.norm.offset()
    made = made if gain is None else made * gain[step.channels]
    return made if offset is None else made + offset[step.channels]


def turned(step: Rotary, x: Tensor, positions: Tensor) -> Tensor:
    """x [B, L, H, D] turned by positions [B | 1, L]."""
    angle = positions.to(torch.float32)[..., None, None] * step.inv_freq  # [B | 1, L, 1, dims / 2]
    cos, sin = angle.cos() * step.scaling, angle.sin() * step.scaling
    before, part, after = x.split([step.first, step.dims, x.shape[-1] - step.first - step.dims], -1)
    if step.interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
        part = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = part.chunk(2, -1)
        part = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([before, part, after], -1)


def cached(step: CacheUpdate, x: Tensor, past: Tensor | None, indices: Tensor | None) -> Tensor:
    if past is None:
        raise ValueError("this block reads a cache: give its past rows")
    if step.kind == "concat":
        return torch.cat([past, x], 1)
    if indices is None:
        raise ValueError("this block writes into a fixed cache: give the indices of the new rows")
    return past.index_copy(1, indices, x)


def as_rows(operand: Operand, tensor: Tensor, axes: Mapping[str, Group], *, batch: int | None = None) -> Tensor:
    """What an operand q, k, v, a cache or positions holds, as [B, L, H, D]: batch, all other positions, heads, width.

    `axes` are those of the site. Axes that the operand lacks become size 1, heads and width of positions too. `batch` is needed
    only where one dimension holds batch and positions.
    """
    several, heads = set(axes["b"]), [*axes["g"], *axes["r"]]
    width = set(axes["d"]) | set(axes["e"])
    order = [axis for group in operand.layout for axis in group]
    known = {} if batch is None or len(axes["b"]) != 1 else {axes["b"][0]: batch}
    sizes = split_sizes(operand, tensor, known)
    apart = tensor.reshape([sizes[axis] for axis in order])

    def role(axis: Axis) -> int:
        return 0 if within(axis, several) else 2 if within(axis, heads) else 3 if within(axis, width) else 1

    moved = apart.permute(sorted(range(len(order)), key=lambda i: role(order[i])))
    merged = [1, 1, 1, 1]
    for axis in order:
        merged[role(axis)] *= sizes[axis]
    return moved.reshape(merged)


def within(axis: Axis, axes: set[Axis] | list[Axis]) -> bool:
    """Whether an axis is one of these, or a part of one that was split."""
    return any(axis == whole or axis.name.startswith(f"{whole.name}.") for whole in axes)


def split_sizes(operand: Operand, tensor: Tensor, given: Mapping[Axis, int]) -> dict[Axis, int]:
    """The size of every axis; of several axes in one dimension at most one may be neither a number nor given."""
    sizes: dict[Axis, int] = {}
    for group, whole in zip(operand.layout, tensor.shape, strict=True):
        known = 1
        for axis in group:
            size = given.get(axis, axis.size)
            if isinstance(size, int):
                sizes[axis] = size
                known *= size
        for axis in group:
            if axis not in sizes:
                sizes[axis] = whole // known
                known = whole
    return sizes
