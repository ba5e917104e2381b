"""How a live model turns queries to their positions, read from its own rotary module and its own function.

    queries turned -> undone(q)          the mean turn of the next n positions -> future(n) [B|1, 1, D, D]

`apply_rotary_pos_emb` of the file that a model comes from is linear in the query and in (cos, sin). So applied to unit vectors with
mean cos and sin it gives the matrix of the mean turn, whatever the layout of its pairs; and with -sin it undoes the turn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.errors import AttnoptError


@dataclass(frozen=True, eq=False)
class Turning:
    """One call of a rotary module: its arguments, and cos and sin [B|1, L, D] of the positions of this call."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cos: Tensor
    sin: Tensor

    @property
    def kind(self) -> str:
        """The layer type that it is for, where a model has several."""
        return next((x for x in (*self.args, *self.kwargs.values()) if isinstance(x, str)), "")

    def undone(self, q: Tensor, apply: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        """q [B, H, L, D] before it was turned."""
        square = (self.cos.double().square() + self.sin.double().square()).mean().to(q.dtype)
        return turned(q, self.cos / square, -self.sin / square, apply)

    def future(self, count: int, width: int, apply: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        """The mean turn of the next `count` positions, [B|1, 1, D, D]."""

        def later(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.is_floating_point():
                return x
            return x[..., -1:] + 1 + torch.arange(count, device=x.device)

        with torch.no_grad():  # forward itself: a call would be seen as one of the model's
            cos, sin = self.module.forward(*map(later, self.args), **{name: later(x) for name, x in self.kwargs.items()})
        cos, sin = (x.float().mean(1, keepdim=True) for x in (cos, sin))
        unit = torch.eye(width, device=cos.device).expand(len(cos), 1, width, width)
        return turned(unit, cos, sin, apply).mT


def turned(q: Tensor, cos: Tensor, sin: Tensor, apply: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """q [B, H, L, D] turned; where only the first channels turn, and the model cuts them off itself, the others stay."""
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    try:
        return apply(q, q, cos, sin)[0]
    except RuntimeError:
        part = q[..., : cos.shape[-1]]
        return torch.cat([apply(part, part, cos, sin)[0], q[..., cos.shape[-1] :]], -1)


def function_of(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`apply_rotary_pos_emb` of the file that an attention comes from; None where it has none."""
    return getattr(sys.modules.get(type(attention).__module__), "apply_rotary_pos_emb", None)


def turns(attention: nn.Module) -> bool:
    """Whether this layer turns its queries at all: some models leave it out in some layers."""
    return bool(getattr(attention, "use_rope", True))


def unreadable(attention: nn.Module, why: str) -> AttnoptError:
    return AttnoptError(
        f"how {type(attention).__name__} turns queries to their positions cannot be read: {why}",
        next_move='Use a policy that needs no queries before they are turned, such as "snapkv" or "key-norm".',
    )


def reads(attention: nn.Module) -> None:
    """Raises AttnoptError where only a part of a row is turned and it is not the first."""
    if hasattr(getattr(attention, "config", None), "qk_rope_head_dim"):
        raise unreadable(attention, "its queries have a part of their own for positions")
