"""Keys or values that are codes still: a tensor of their shape which becomes numbers when something asks for them.

    k, v = cache.update(…)      k.shape, k.dtype, k.device: as if it were read      a kernel takes k.stored.packed      k[:, :1]: is read

The attention of a live layer that has a kernel for codes takes them as they are. Whatever else is done with such a tensor is done with
what its codes stand for, which is read once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

TOLD = tuple(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "requires_grad", "ndim"))


class Unread(Tensor):
    """stored: what it stands for, [B, G, L, D]: it has `rows`, `dtype` and `device`, and `read` gives the numbers."""

    stored: Any
    found: Tensor | None

    @staticmethod
    def __new__(cls, stored: Any, width: int) -> Unread:
        made: Unread = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (*stored.rows, width), dtype=stored.dtype, device=stored.device
        )
        made.stored, made.found = stored, None
        return made

    def numbers(self) -> Tensor:
        """What the codes stand for."""
        if self.found is None:
            self.found = self.stored.read()
        return self.found

    def cut(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """What `change` leaves of the tokens: the others are not read."""
        return self.stored.part(change)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TOLD:
            return super().__torch_function__(func, types, args, kwargs or {})
        args, kwargs = tree_map_only(Unread, Unread.numbers, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Unread, Unread.numbers, (args, kwargs or {}))
        return func(*args, **kwargs)
