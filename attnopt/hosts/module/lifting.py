"""Keys that a live layer keeps as they are before they are turned, in few channels, and lifts and turns when they are read.

    k_proj(x) = [c, 0], c of r channels -> the layer turns it -> update(k)       ->     kept: k turned back, [..., :r]
    read: turn(kept @ up [G, r, D]) by the positions of the tokens in the cache  ->     k [B, G, T, D], as attention takes it

The layer's forward stays its own, so what comes is turned already, by the positions that the layer is called with. Positions of past
tokens are not kept: they count back from that of the newest, as transformers counts them. Where they were given in another way that
cannot be known, and is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import AttnoptError

UP = "attnopt_up"  # of an attention module: what lifts its keys, a buffer [G, r, D]
MADE = "attnopt_waves"  # of the positions of a call: cosines and sines that were made of them


@dataclass(frozen=True)
class Turn:
    """Channels first … first + dims turn by position * inv_freq, as in `ir.block.Rotary`.

    Each channel c of a row becomes x[c] cos[c] + x[partner(c)] sin[c], its sign in the sine; those that do not turn have cosine 1.
    """

    dims: int
    first: int
    interleaved: bool
    inv_freq: tuple[float, ...]
    scaling: float

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Turn:
        """From the options of a change."""
        return cls(**{**given, "inv_freq": tuple(given["inv_freq"])})

    def waves(self, positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [B, G | 1, L, D] of positions [B, L] or [B, G, L], for heads of D channels."""
        of = table_of(self, width, positions.device)
        angle = positions.to(torch.float32)[..., None] * of.frequency
        angle = angle[:, None] if positions.ndim == 2 else angle
        return angle.cos() * of.scale, angle.sin() * of.sign

    def partners(self, x: Tensor) -> Tensor:
        """x [.., D] with each channel's partner in its place."""
        return x.index_select(-1, table_of(self, x.shape[-1], x.device).partner)

    def undone(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x before it was turned: turned the other way, and divided by the scaling twice where it was scaled."""
        back = torch.addcmul(x * cos.to(x.dtype), self.partners(x), sin.to(x.dtype), value=-1)
        return back if self.scaling == 1.0 else back / table_of(self, x.shape[-1], x.device).scale.square().to(x.dtype)


@dataclass(frozen=True, eq=False)
class Table:
    """For each channel [D]: its frequency, its partner, the factor of its cosine, and of its sine."""

    frequency: Tensor
    partner: Tensor
    scale: Tensor
    sign: Tensor


def table_of(turn: Turn, width: int, device: torch.device) -> Table:
    make = table.__wrapped__ if torch.compiler.is_compiling() else table  # torch.compile warns of what is kept
    return make(turn, width, device)


@functools.lru_cache(maxsize=16)
def table(turn: Turn, width: int, device: torch.device) -> Table:
    with torch.inference_mode(False):  # it is kept, and read with gradients too
        half = turn.dims // 2
        local = torch.arange(turn.dims)
        pair, other = (local // 2, local ^ 1) if turn.interleaved else (local % half, (local + half) % turn.dims)
        inside = slice(turn.first, turn.first + turn.dims)
        frequency, partner, scale, sign = torch.zeros(width), torch.arange(width), torch.ones(width), torch.zeros(width)
        frequency[inside], partner[inside] = torch.tensor(turn.inv_freq)[pair], other + turn.first
        scale[inside], sign[inside] = turn.scaling, torch.where(other > local, -turn.scaling, turn.scaling)
        return Table(*(x.to(device) for x in (frequency, partner, scale, sign)))


@dataclass(frozen=True, eq=False)
class Lifting:
    """One call of a layer. up [G, r, D]. positions [B | 1, n]: of the tokens that come. mask: what transformers made for this call.
    windowed: whether the layer sees its last keys alone."""

    turn: Turn
    up: Tensor
    positions: Tensor
    mask: Any
    windowed: bool

    def flat(self, k: Tensor) -> Tensor:
        """Keys that come [B, G, n, D] before they were turned; in their first channels are those that are kept."""
        return self.turn.undone(k, *self.waves())

    def read(self, kept: Tensor, layer: Any = None) -> Tensor:
        """Keys [B, G, T, D] from what is kept of them. layer: of the cache that holds them, None without one."""
        places = getattr(layer, "places", None)  # [B, G, T], of a cache that forgets
        if places is not None:
            at = self.counted(layer.seen, layer.seen)
            at = at[:, None].expand(*places.shape[:2], -1).gather(2, places.clamp(max=layer.seen - 1).long())
            cos, sin = self.turn.waves(at, self.up.shape[-1])
        elif kept.shape[2] == self.positions.shape[1] or layer is None:
            cos, sin = self.waves()
        else:
            cos, sin = self.waves(kept.shape[2], layer.get_seq_length())
        x, other = kept @ self.up, kept @ self.turn.partners(self.up)
        return x.mul_(cos.to(x.dtype)).addcmul_(other, sin.to(x.dtype))

    def waves(self, places: int = 0, seen: Any = 0) -> tuple[Tensor, Tensor]:
        """Of the tokens that come, or of so many places of a cache: made once for all layers of a call, which share its positions."""

        def made() -> tuple[Tensor, Tensor]:
            return self.turn.waves(self.counted(places, seen) if places else self.positions, self.up.shape[-1])

        tensors = [x for x in (self.positions, self.mask) if isinstance(x, Tensor)]
        if torch.compiler.is_compiling() or isinstance(seen, Tensor) or any(x.is_inference() for x in tensors):
            return made()
        held = self.positions.__dict__.setdefault(MADE, {})
        key = (self.turn, self.up.shape[-1], places, seen, self.windowed, id(self.mask), *(x._version for x in tensors))
        if key not in held:
            held[key] = (self.mask, made())  # with the mask, so that no other takes its place in memory
        return held[key][1]  # type: ignore[no-any-return]

    def counted(self, places: int, seen: Any) -> Tensor:
        """Positions of so many places of a cache, [B, places], of which the newest token has the last that is written.

        They count places, as a model does by itself, or tokens without padding, as `generate` does: the newest says which.
        seen: how many tokens the cache has had. Raises AttnoptError where the newest says neither.
        """
        last = self.positions[:, -1:]
        written = seen.clamp(max=places) if isinstance(seen, Tensor) else min(seen, places)
        behind, known = written - 1 - torch.arange(places, device=last.device)[None], last + 1 == seen
        if self.mask is not None:
            there = shown(self.mask, places).to(torch.int64)
            tokens = there.sum(-1, keepdim=True)
            behind = torch.where(known, behind, tokens - there.cumsum(-1))
            known = known | (tokens <= last + 1 if self.windowed else tokens == last + 1)
        if not torch.compiler.is_compiling() and not bool(known.all()):
            raise AttnoptError(
                "positions do not count the tokens that a layer sees, and its keys are turned when they are read, by what they count",
                next_move="Leave position_ids= out, or give the attention_mask of all tokens that were seen.",
            )
        return last - behind


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
