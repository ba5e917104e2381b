"""Keys that a live layer keeps as they are before they are turned, in few channels, and lifts and turns when they are read.

    k_proj(x) = [c, 0], c of r channels -> the layer turns it -> update(k)       ->     kept: k turned back, [..., :r]
    read: turn(kept @ up [G, r, D]) by the positions of the tokens in the cache  ->     k [B, G, T, D], as attention takes it

The layer's forward stays its own, so what comes is turned already, by the positions that the layer is called with. Positions of past
tokens are not kept: they count back from those of the newest, past what its mask hides, as transformers counts them. Where they were
given in another way that cannot be known, and is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import AttnoptError

UP = "attnopt_up"  # of an attention module: what lifts its keys, a buffer [G, r, D]


@dataclass(frozen=True)
class Turn:
    """Channels first … first + dims turn by position * inv_freq, as in `ir.block.Rotary`."""

    dims: int
    first: int
    interleaved: bool
    inv_freq: tuple[float, ...]
    scaling: float

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Turn:
        """From the options of a change."""
        return cls(**{**given, "inv_freq": tuple(given["inv_freq"])})

    def waves(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, G | 1, L, dims / 2] of positions [B, L] or [B, G, L]."""
        angle = positions.to(torch.float32)[..., None] * torch.tensor(self.inv_freq, device=positions.device)
        angle = angle[:, None] if positions.ndim == 2 else angle
        return angle.cos() * self.scaling, angle.sin() * self.scaling

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, G, L, D] with its channels turned."""
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        before, part, after = x.split([self.first, self.dims, x.shape[-1] - self.first - self.dims], -1)
        a, b = (part[..., 0::2], part[..., 1::2]) if self.interleaved else part.chunk(2, -1)
        pair = a * cos - b * sin, b * cos + a * sin
        made = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return made if made.shape == x.shape else torch.cat([before, made, after], -1)

    def undone(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x before it was turned."""
        square = self.scaling**2
        return self.turned(x, cos / square, -sin / square)


@dataclass(frozen=True, eq=False)
class Lifting:
    """One call of a layer. positions [B | 1, n]: of the tokens that come. mask: what transformers made for this call. windowed: whether
    the layer sees its last keys alone."""

    turn: Turn
    up: Tensor
    positions: Tensor
    mask: Any
    windowed: bool

    def flat(self, k: Tensor) -> Tensor:
        """Keys that come [B, G, n, D] before they were turned; in their first channels are those that are kept."""
        return self.turn.undone(k, *self.turn.waves(self.positions))

    def read(self, kept: Tensor, layer: Any = None) -> Tensor:
        """Keys [B, G, T, D] from what is kept of them. layer: of the cache that holds them, None without one."""
        places = getattr(layer, "places", None)  # [B, G, T], of a cache that forgets
        if places is not None:
            at = self.counted(layer.seen, layer.seen)
            at = at[:, None].expand(*places.shape[:2], -1).gather(2, places.clamp(max=layer.seen - 1).long())
        elif kept.shape[2] == self.positions.shape[1] or layer is None:
            at = self.positions
        else:
            at = self.counted(kept.shape[2], layer.get_seq_length())
        return self.turn.turned(kept @ self.up, *self.turn.waves(at))

    def counted(self, places: int, seen: Any) -> Tensor:
        """Positions of so many places of a cache, [B, places], of which the newest token has the last that is written."""
        last = self.positions[:, -1:]
        if self.mask is None:
            written = seen.clamp(max=places) if isinstance(seen, Tensor) else min(seen, places)
            behind = written - 1 - torch.arange(places, device=last.device)[None]
            self.require(written if isinstance(written, Tensor) else torch.tensor([written], device=last.device), last)
        else:
            there = shown(self.mask, places).to(torch.int64)
            tokens = there.sum(-1, keepdim=True)
            behind = tokens - there.cumsum(-1)
            self.require(tokens, last)
        return last - behind

    def require(self, tokens: Tensor, last: Tensor) -> None:
        """Raises AttnoptError where so many tokens are seen and the newest has a position that does not count them."""
        if torch.compiler.is_compiling():
            return
        wrong = tokens > last + 1 if self.windowed else tokens != last + 1
        if bool(wrong.any()):
            raise AttnoptError(
                "positions do not count the tokens that a layer sees, and its keys are turned when they are read, by what they count",
                next_move="Leave position_ids= out, or give the attention_mask of all tokens that were seen.",
            )


def shown(mask: Any, places: int) -> Tensor:
    """Which of the places the last query sees, bool [B, places]."""
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4) or mask.shape[-1] < places:
        raise AttnoptError(
            f"a mask of type {type(mask).__name__} does not say which tokens the newest sees, by which keys are turned when read",
            next_move='Load the model with attn_implementation="sdpa" or "eager".',
        )
    last = mask[:, 0, -1] if mask.ndim == 4 else mask
    seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2 if last.is_floating_point() else last != 0
    return seen[:, :places]


def lifting(turn: Turn, up: Tensor, positions: Any, mask: Any, windowed: bool) -> Lifting:
    """Raises AttnoptError where the layer is not told the positions of its tokens."""
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        raise AttnoptError(
            "a layer is not told the positions of its tokens, so that nothing can turn its keys when they are read",
            next_move="Optimise the model without keys that are lifted.",
        )
    return Lifting(turn, up, positions, mask, windowed)
