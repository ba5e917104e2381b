"""Round a weight matrix one input after the other, each rounding error carried over to the inputs that are still to come.

    minimise tr((W - V) H (W - V)')  over V on the grid,   H = X'X / rows of what the layer reads

    for input j:  v_j = round(w_j),   e = (w_j - v_j) / U_jj,   w_k -= e U_jk  for k > j        U'U = inverse of (H + damping)

Blocks of inputs are finished before the rest is touched, which changes the order of sums only. The grid of a group is laid when its first
input is reached, from the weights as they are by then; with `by_activation` (inputs of largest H_jj first) it is laid before. An input
that calibration never saw keeps its nearest level (the authors' code makes it 0).
Source: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"; damping and blocks as there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.site import Refusal
from attnopt.rounding.grids import Gridding
from attnopt.rounding.rounded_weight import RoundedWeight
from attnopt.rounding.weight_format import WeightFormat

BLOCK = 128  # inputs
DAMPING = 0.01  # of the mean of the diagonal of H
MOST_DAMPING = 1e6  # of the same mean: no H of finite numbers needs more
MEMORY = 8 * 2**30  # bytes


@dataclass(frozen=True)
class Gptq:
    """gridding: how the levels of a group are laid. by_activation: inputs that vary most go first."""

    gridding: Gridding = Gridding("squares")
    damping: float = DAMPING
    block: int = BLOCK
    by_activation: bool = False

    def refusal(self, outputs: int, inputs: int, memory: int = MEMORY) -> Refusal | None:
        """Why a layer of this size is too large: H, its inverse, the weights and their errors are held at once in float64."""
        needed = 8 * (3 * inputs**2 + 3 * outputs * inputs)
        if needed <= memory:
            return None
        return Refusal(
            f"GPTQ of {outputs} x {inputs} weights would take {needed / 2**30:.1f} GiB, more than {memory / 2**30:.1f}"
        )

    def rounded(self, weight: Tensor, moment: Tensor, format: WeightFormat) -> RoundedWeight:
        """Weights [out, in] on the grid. moment [in, in], of any scale. Both finite; the group divides (`unfit`)."""
        w, h = weight.double().clone(), moment.double().clone()
        inputs = w.shape[1]
        diagonal = h.diagonal()
        order = diagonal.argsort(descending=True, stable=True) if self.by_activation else torch.arange(inputs)
        width = format.group or inputs
        fixed = self.by_activation or format.group == 0
        steps, zeros = torch.ones_like(w), torch.full_like(w, float(format.middle))
        if fixed:
            importance = diagonal if bool(diagonal.sum() > 0) else None
            steps, zeros = (x[:, order] for x in spread(self.gridding.grid(w, format, importance), width, inputs))
        w, h = w[:, order], h[order][:, order]
        upper = inverse_factor(h, self.damping)
        codes = torch.empty(w.shape, dtype=torch.uint8)
        for start in range(0, inputs, self.block):
            stop = min(start + self.block, inputs)
            errors = torch.zeros(w.shape[0], stop - start, dtype=torch.float64)
            for j in range(start, stop):
                if not fixed and j % width == 0:
                    self.lay(w, steps, zeros, errors, upper, (start, j, stop), format)
                step, zero = steps[:, j], zeros[:, j]
                code = torch.round(w[:, j] / step + zero).clamp_(0, format.levels - 1)
                codes[:, j] = code.to(torch.uint8)
                error = (w[:, j] - (code - zero) * step) / upper[j, j]
                w[:, j + 1 : stop] -= error[:, None] * upper[j, j + 1 : stop]
                errors[:, j - start] = error
            w[:, stop:] -= errors @ upper[start:stop, stop:]
        back = order.argsort()
        codes = codes[:, back]
        first = torch.arange(0, inputs, width)
        kept_zeros = zeros[:, back][:, first].float() if format.zeros else float(zeros[0, 0])
        return RoundedWeight(format, codes, steps[:, back][:, first].float(), kept_zeros)

    def lay(
        self,
        w: Tensor,
        steps: Tensor,
        zeros: Tensor,
        errors: Tensor,
        upper: Tensor,
        at: tuple[int, int, int],
        format: WeightFormat,
    ) -> None:
        """The grid of the group that begins at an input, from the weights as they are; those past the block are brought up to date."""
        start, j, stop = at
        end = j + format.group
        held = w[:, j:end].clone()
        if end > stop:
            held[:, stop - j :] -= errors[:, : j - start] @ upper[start:j, stop:end]
        one = WeightFormat(format.bits, 0, format.zeros)
        steps[:, j:end], zeros[:, j:end] = spread(self.gridding.grid(held, one), format.group, format.group)


def spread(grid: tuple[Tensor, Tensor | float], width: int, inputs: int) -> tuple[Tensor, Tensor]:
    """A grid's steps and zeros for each input, float64 [out, in]; steps as float32 holds them."""
    steps, zeros = grid
    steps = steps.float().double()
    held = zeros.double() if isinstance(zeros, Tensor) else torch.full_like(steps, zeros)
    return tuple(x.repeat_interleave(width, 1)[:, :inputs].contiguous() for x in (steps, held))  # type: ignore[return-value]


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with U'U = inverse of H plus damping; damping is added again until H is positive definite."""
    h = moment.clone()
    unseen = h.diagonal() <= 0
    h[unseen, unseen] = 1.0
    mean = float(h.diagonal().mean())
    eye, added = torch.eye(len(h), dtype=h.dtype), damping * mean
    lower, info = torch.linalg.cholesky_ex(h + added * eye)
    while int(info) and added < MOST_DAMPING * mean:
        added = 2 * added + DAMPING * mean
        lower, info = torch.linalg.cholesky_ex(h + added * eye)
    if int(info):
        raise ValueError("the second moment holds numbers that are not finite, or is no second moment")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def reconstruction_error(weight: Tensor, made: RoundedWeight, moment: Tensor) -> float:
    """tr((W - V) H (W - V)'): what a layer's output loses, in squares, for each row of its input."""
    away = weight.double() - made.matrix(torch.float64)
    return float(((away @ moment.double()) * away).sum())
