"""Which rows of a tensor are real, and which are padding that no statistic and no loss counts.

    attention_mask [batch, length] = 1 1 1 0      hidden [batch, length, C]     ->   rows 0 to 2 of that sample count

The rule: an input whose name ends in "attention_mask" and holds only 0 and 1 in two dimensions says which rows are real of every
tensor [batch, length, …] (or [batch * length, …]) of the same length, and of the last rows where a past makes the mask longer. A
length is the same where the graph calls it the same, or calls it as the input that the mask is named after does: exporters name the
lengths of input_ids and attention_mask, of decoder_input_ids and decoder_attention_mask, each anew. Rows of a tensor that no mask
fits, or that two different masks fit, all count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from attnopt.ir.dims import Dim, Shape, divide, terms_of
from attnopt.ir.graph import Graph

ENDING = "attention_mask"


@dataclass(frozen=True)
class Mask:
    """An input that says which rows are real: what its two dimensions are called, the second under all of its names."""

    name: str
    batch: Dim
    length: Dim
    names: frozenset[Dim]


@dataclass(frozen=True)
class Padding:
    """The masks among the inputs of a graph."""

    masks: tuple[Mask, ...] = ()

    @classmethod
    def of(cls, graph: Graph) -> Padding:
        ranked = {v.name: v.shape for v in graph.inputs if v.shape is not None and len(v.shape) > 1}
        found: list[Mask] = []
        for name, shape in ranked.items():
            if name.endswith(ENDING) and len(shape) == 2:
                start = f"{name.removesuffix(ENDING)}input"
                named_after = {other[1] for key, other in ranked.items() if key.startswith(start)}
                found.append(Mask(name, shape[0], shape[1], frozenset({shape[1], *named_after})))
        return cls(tuple(found))

    def rows(self, length: Dim, batch: int, count: int, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Which rows of `batch` sequences of `count` tokens are real, bool [batch, count]; None where all count.

        length: the graph's name for `count`.
        """
        masks = [(mask, inputs[mask.name]) for mask in self.masks if is_mask(inputs[mask.name])]
        masks = [(mask, held) for mask, held in masks if len(held) in (1, batch) and held.shape[1] >= count]
        fits = [x for m, x in masks if length in m.names] or [x for m, x in masks if is_longer(m.length, length)]
        return fits[0][:, -count:].bool().expand(batch, count) if len(fits) == 1 else None

    def leading(self, shape: Shape | None, tensor: Tensor, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Which rows of a tensor that the graph calls `shape` are real, bool over its first dimensions; None where all count."""
        if shape is None or len(shape) < 2:
            return None
        if len(shape) > 2:
            return self.rows(shape[1], tensor.shape[0], tensor.shape[1], inputs)
        for mask in self.masks:  # [batch * length, C]
            held = inputs[mask.name]
            lengths = [n for n in mask.names if divide(shape[0], n) not in (None, 1)]
            if lengths and tensor.shape[0] == held.numel() and mask.batch != 1:
                found = self.rows(lengths[0], len(held), held.shape[1], inputs)
                return None if found is None else found.reshape(-1)
        return None


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
    return flat[spread.reshape(-1)]
