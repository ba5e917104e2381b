"""Rounded weights by content: what was rounded once is not searched for again.

    (how levels are laid, format, the bytes of W)   ->   RoundedWeight

A search of plans rounds each matrix once for every trial that holds it, in copies of the model that share no tensor: so the numbers
themselves are the key, by their digest, which takes a thousandth of the time. The same numbers give the same codes, so nothing depends
on what is remembered. Up to a limit of bytes; what was used longest ago is let go first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from attnopt.rounding.rounded_weight import RoundedWeight

MEMORY = 1 << 28  # bytes


@dataclass
class RoundedBefore:
    """memory: bytes of codes, steps and zero points that are kept at most."""

    memory: int = MEMORY
    kept: dict[Hashable, RoundedWeight] = field(default_factory=dict)
    size: int = 0
    lock: Lock = field(default_factory=Lock, repr=False)

    def of(self, key: Hashable, tensors: tuple[Tensor | None, ...], make: Callable[[], RoundedWeight]) -> RoundedWeight:
        """What was made of these tensors under this key, or is made now. Its tensors are not to be written to."""
        whole = (key, *map(digest, tensors))
        with self.lock:
            if (found := self.kept.pop(whole, None)) is not None:
                self.kept[whole] = found
                return found
        made = make()
        with self.lock:
            if whole not in self.kept:
                self.kept[whole] = made
                self.size += held(made)
            while self.size > self.memory:
                self.size -= held(self.kept.pop(next(iter(self.kept))))
        return made


def digest(tensor: Tensor | None) -> Hashable:
    """Type, shape and a digest of the numbers."""
    if tensor is None:
        return None
    numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return str(tensor.dtype), tuple(tensor.shape), hashlib.blake2b(numbers.data, digest_size=16).digest()


def held(made: RoundedWeight) -> int:
    """Bytes in memory, codes not packed."""
    return sum(x.nbytes for x in (made.codes, made.steps, made.zeros) if isinstance(x, Tensor))
