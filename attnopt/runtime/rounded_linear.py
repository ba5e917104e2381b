"""attnopt::rounded_linear: a linear layer whose weights are kept in few bits and made whole for each call.

    y = x ((codes - zeros) * steps)' + b          steps per row, or per group of a row's inputs

It saves memory, not time: torch has no kernel on a CPU that multiplies float32 rows by narrow weights faster than by float32 ones
(its packed int4 and int8 products, float32: 18 and 6 times as slow as `linear` at one row of 384 inputs and 1536 outputs, 340 and 150
times at 128 rows; of bfloat16 rows as fast at one row, 20 times as slow at 128). Making the weights whole costs what reading them does,
whatever the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.rounding.bit_packing import unpacked


def whole(codes: Tensor, steps: Tensor, zeros: Tensor | None, bits: int, middle: float, inputs: int) -> Tensor:
    """The weights [out, in] that codes [out, bytes] stand for, in the type of the steps [out, groups]."""
    found = unpacked_fast(codes, bits, inputs).to(steps.dtype).unflatten(1, (steps.shape[1], -1))
    found -= middle if zeros is None else zeros.to(steps.dtype)[..., None]
    return (found * steps[..., None]).flatten(1)


def unpacked_fast(codes: Tensor, bits: int, inputs: int) -> Tensor:
    """`unpacked` by bytes where codes do not cross them."""
    if bits == 8:
        return codes
    if 8 % bits:
        return unpacked(codes, bits, inputs)
    parts = [codes >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(1)[:, :inputs]


@torch.library.custom_op("attnopt::rounded_linear", mutates_args=())
def rounded_linear(
    x: Tensor, codes: Tensor, steps: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, middle: float
) -> Tensor:
    """x [..., in], codes uint8 [out, bytes], steps [out, groups], zeros uint8 [out, groups] or None -> [..., out]."""
    weight = whole(codes, steps.to(x.dtype), zeros, bits, middle, x.shape[-1])
    return torch.nn.functional.linear(x, weight, bias)


@rounded_linear.register_fake
def _(x: Tensor, codes: Tensor, steps: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, middle: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))
