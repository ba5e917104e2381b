"""A matrix of weights in few bits: codes, steps, zero points; what it stands for, and what it is made from.

    rounded(W [out, in], steps, zeros, format)   ->   RoundedWeight          .matrix() = (codes - zeros) * steps

A zero point need not be whole: levels in the middle of their bins (QuEST) have 2^(bits - 1) - 1/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.site import Refusal
from attnopt.rounding.bit_packing import packed, unpacked
from attnopt.rounding.weight_format import WeightFormat


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """codes uint8 [out, in]; steps float32 [out, groups]; zeros float32 of the same shape, or one number for all: the middle."""

    format: WeightFormat
    codes: Tensor
    steps: Tensor
    zeros: Tensor | float

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in] that it stands for."""
        zeros = self.zeros.to(dtype)[..., None] if isinstance(self.zeros, Tensor) else self.zeros
        return ((grouped(self.codes.to(dtype), self.format) - zeros) * self.steps.to(dtype)[..., None]).flatten(1)

    def bytes(self) -> int:
        """Bytes of packed codes, steps and zero points."""
        return int(-(-self.codes.shape[0] * self.codes.shape[1] * self.format.width(self.codes.shape[1]) // 8))

    def arrays(self) -> dict[str, Tensor]:
        """Packed codes, steps and zero points, from which `from_arrays` makes it again."""
        zeros = self.zeros if isinstance(self.zeros, Tensor) else torch.tensor(self.zeros)
        return {"codes": packed(self.codes, self.format.bits), "steps": self.steps, "zeros": zeros}

    @classmethod
    def from_arrays(cls, format: WeightFormat, arrays: dict[str, Tensor], inputs: int) -> RoundedWeight:
        zeros = arrays["zeros"]
        codes = unpacked(arrays["codes"], format.bits, inputs)
        return cls(format, codes, arrays["steps"], zeros if zeros.ndim else float(zeros))


def grouped(weight: Tensor, format: WeightFormat) -> Tensor:
    """[out, in] -> [out, groups, group]."""
    return weight.unflatten(1, (format.groups(weight.shape[1]), -1))


def rounded(weight: Tensor, steps: Tensor, zeros: Tensor | float, format: WeightFormat) -> RoundedWeight:
    """Each weight [out, in] to the nearest level of its group; steps [out, groups] may be negative, not 0."""
    steps = steps.float()
    held = zeros.to(weight.dtype)[..., None] if isinstance(zeros, Tensor) else zeros
    found = torch.round(grouped(weight, format) / steps.to(weight.dtype)[..., None] + held)
    zeros = zeros.float() if isinstance(zeros, Tensor) else zeros
    return RoundedWeight(format, found.clamp(0, format.levels - 1).to(torch.uint8).flatten(1), steps, zeros)


def unfit(weight: Tensor, format: WeightFormat, name: str = "") -> Refusal | None:
    """Why this matrix [out, in] cannot be rounded: a group that does not divide, or numbers that are none, which would spread."""
    refusal = format.refusal(weight.shape[1])
    if refusal is not None:
        return Refusal(refusal.reason, name or None, remedy=refusal.remedy)
    return not_finite(weight, name)


def not_finite(weight: Tensor, name: str = "") -> Refusal | None:
    """Why a matrix cannot be rounded at all: numbers that are none, with the first of them."""
    if math.isfinite(float(weight.sum())):  # a NaN or infinity anywhere would be in it; a sum of finite numbers may overflow
        return None
    wrong = ~torch.isfinite(weight)
    if count := int(wrong.sum()):
        first = [int(i) for i in wrong.nonzero()[0]]
        what = "NaN" if bool(torch.isnan(weight[wrong]).any()) else "infinite"
        return Refusal(f"{count} weights are {what}, the first at {first}", name or None)
    return None
