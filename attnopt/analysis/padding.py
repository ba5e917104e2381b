"""Which rows of a tensor are real, and which are padding that no statistic and no loss counts.

    attention_mask [batch, length] = 1 1 1 0      hidden [batch, length, C]     ->   rows 0 to 2 of that sample count

The rule: an input whose name ends in "attention_mask" and holds only 0 and 1 in two dimensions says which rows are real of every
tensor that begins with the same two dimensions (or their product), and of the last rows where a past makes the mask longer
(past + length against length). Rows of a tensor that no mask fits, or that two different masks fit, all count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.dims import Dim, Shape, product, terms_of
from attnopt.ir.graph import Graph

ENDING = "attention_mask"


@dataclass(frozen=True)
class Padding:
    """The masks among the inputs of a graph: name, and its two dimensions."""

    masks: tuple[tuple[str, Dim, Dim], ...] = ()

    @classmethod
    def of(cls, graph: Graph) -> Padding:
        two = [v for v in graph.inputs if v.name.endswith(ENDING) and v.shape is not None and len(v.shape) == 2]
        return cls(tuple((v.name, v.shape[0], v.shape[1]) for v in two if v.shape is not None))

    def rows(self, batch: Dim, length: Dim, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Which of the rows [batch, length] are real, as bool; None where all count."""
        fits = [name for name, *dims in self.masks if dims == [batch, length] and is_mask(inputs[name])]
        fits = fits or [n for n, b, k in self.masks if b == batch and is_longer(k, length) and is_mask(inputs[n])]
        if len(fits) != 1:
            return None
        return inputs[fits[0]].bool()

    def leading(self, shape: Shape | None, tensor: Tensor, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Which rows of a tensor of this graph's shape are real, as bool over its first dimensions; None where all count."""
        for name, batch, length in self.masks if shape is not None else ():
            if len(shape or ()) > 1 and shape is not None and shape[0] == product((batch, length)) and shape[0] not in (batch, 1):
                found = self.rows(batch, length, inputs)
                return None if found is None or inputs[name].numel() != tensor.shape[0] else found.reshape(-1)
        if shape is None or len(shape) < 3:
            return None
        found = self.rows(shape[0], shape[1], inputs)
        return None if found is None else found[:, -tensor.shape[1] :]


def is_mask(tensor: Tensor) -> bool:
    return bool(((tensor == 0) | (tensor == 1)).all())


def is_longer(whole: Dim, part: Dim) -> bool:
    """Whether a length is another one and something more: past + sequence against sequence."""
    more, less = terms_of(whole), terms_of(part)
    if more is None or less is None or isinstance(whole, int):
        return False
    rest = {key: more.get(key, 0) - less.get(key, 0) for key in {**more, **less}}
    return any(rest.values()) and all(count >= 0 for count in rest.values())


def real(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """The real rows of a tensor [..., C] as [rows, C]; `rows` is bool over its first dimensions."""
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
    if rows is None:
        return flat
    spread = rows.reshape(*rows.shape, *[1] * (tensor.ndim - 1 - rows.ndim)).expand(tensor.shape[:-1])
    return flat[torch.as_tensor(spread).reshape(-1)]
