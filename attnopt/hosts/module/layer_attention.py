"""What one attention layer of a live model computes, and by which kernel.

    LayerAttention("softmax scale(0.125) causal & window(64)", scaling=0.125, prefill=…, decode=…)

transformers hands a layer its queries, the keys of its cache, and a mask, or no mask where positions alone say what is seen. Without one
there are two cases: a prompt on an empty cache, whose spec has the layer's own mask, and one query on a cache whose keys it all sees. Each
has a kernel of its own, or None where the model's own way stays.

A plan may have narrowed the mask: then it holds for every call, and what no kernel computes goes the model's own way with both masks.
Selections, corrections and rounded products are of prompts alone, those that are padded on their left among them (`padding`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.hosts.module.narrowing import Reach
from attnopt.ir.clause import Clause
from attnopt.ir.expr import Expr
from attnopt.ir.spec import parse

Kernel = Callable[[Tensor, Tensor, Tensor], Any]
SHORT = 8  # times the keys that a query reads: choosing pages of a cache that is shorter takes longer than reading all of it


@dataclass(frozen=True)
class Called:
    """A kernel as a graph, and what the only operator of the graph runs, which is called where nobody watches for operators: on a short
    cache the graph and torch's dispatcher take as long as the kernel."""

    graph: nn.Module
    run: Kernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return (self.run(q, k, v),) if type(q) is Tensor and unseen() else self.graph(q, k, v)


@dataclass(frozen=True)
class OnCodes:
    """The kernel of one query on a cache in codes. clause: how it is stored. name: "" where codes are read back, because of `why`.

    run(q [B, H, 1, D], what `packed` of the stored keys is, of values) -> o [B, H, 1, E].
    """

    clause: Clause
    name: str = ""
    run: Callable[[Tensor, Any, Any], Tensor] | None = None
    why: str = ""


@dataclass(frozen=True)
class OnPages:
    """How one query chooses pages of a cache and reads them. clause: the choice. name: of the kernel, "" where all is read, for `why`.

    run(q [B, H, 1, D], k [B, G, K, D], v, smallest and largest channels [B, G, P, D] of the pages) -> o [B, H, 1, E].
    """

    clause: Clause
    name: str = ""
    run: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    why: str = ""

    @property
    def size(self) -> int:
        """Keys of a page."""
        return self.clause.count(0)

    @property
    def keys(self) -> int:
        """How many are read at most."""
        return keys_read(self.clause)

    @property
    def least(self) -> int:
        """Keys of a cache from which on a query chooses: a shorter one is read whole."""
        return max(self.keys + 1, SHORT * self.keys)

    def chooses(self, length: int) -> bool:
        """Whether a cache of so many keys is long enough."""
        return length >= self.least


def keys_read(clause: Clause) -> int:
    """By a query that chooses pages."""
    return clause.count(0) * clause.count(1)


# What a layer may hand over beside q, k and v that changes what is computed, and that no spec of ours says.
STRANGE = frozenset(("s_aux", "position_bias", "cache", "cu_seq_lens_q", "cu_seq_lens_k", "block_table", "head_mask"))


@dataclass(frozen=True)
class AttentionCall:
    """How a layer calls its attention: heads of queries, of keys and of values, widths, factors, its window.

    others: those of STRANGE that it hands over: its attention stays the model's own.
    """

    heads: int
    key_heads: int
    value_heads: int
    width: int
    value_width: int
    scaling: float
    softcap: float | None
    causal: bool
    window: int | None
    dtype: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerAttention:
    """spec: the line of what a prompt on an empty cache computes. names: of the kernels of both phases, "" where there is none.

    mask: that of a plan, which hides more than the model's own. reach: the keys that one query sees of a cache, where they can be cut
    out of it. on_codes, on_pages: what one query does on a cache in codes, and on one with bounds of its pages. least: tokens of a cache
    from which on the kernel of decoding is used.
    """

    spec: str
    call: AttentionCall
    prefill: Kernel | None = None
    decode: Kernel | None = None
    names: tuple[str, str] = ("", "")
    device: str = "cpu"
    mask: Expr | None = None
    reach: Reach | None = None
    on_codes: OnCodes | None = None
    on_pages: OnPages | None = None
    least: int = 0
    changes_prompts: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        """What every call asks is found once, and not while torch.compile traces one.

        changes_prompts: whether a prompt computes something else than the layer itself does, which its kernel alone knows."""
        parsed = parse(self.spec)
        changes = not self.narrowed and bool(parsed.selection or parsed.correction or parsed.precision)
        object.__setattr__(self, "changes_prompts", changes)

    @property
    def narrowed(self) -> bool:
        return self.mask is not None

    def kernel(self, query: Tensor, key: Tensor, causal: bool, kwargs: dict[str, Any]) -> Kernel | None:
        """For a call without a mask; None where the model's own attention computes it: in another dtype, elsewhere, with gradients."""
        queries, keys = query.shape[2], key.shape[2]
        kernel = (self.decode if keys >= self.least else None) if queries == 1 else self.prefill if queries == keys else None
        return kernel if kernel is not None and self.takes(query, causal, kwargs) else None

    def of_codes(self, query: Tensor, clause: Clause | None, causal: bool, kwargs: dict[str, Any]) -> Any:
        """The kernel of one query on keys and values in these codes, for a call without a mask; None where they are read back."""
        held = self.on_codes
        if held is None or held.run is None or query.shape[2] != 1 or held.clause != clause:
            return None
        return held.run if self.takes(query, causal, kwargs) else None

    def of_pages(self, query: Tensor, length: int, size: int, causal: bool, kwargs: dict[str, Any]) -> Any:
        """The kernel of one query that chooses pages of `size` among `length` keys, for a call without a mask; None where it reads all."""
        held = self.on_pages
        if held is None or held.run is None or query.shape[2] != 1 or held.size != size or not held.chooses(length):
            return None
        return held.run if self.takes(query, causal, kwargs) else None

    def takes(self, query: Tensor, causal: bool, kwargs: dict[str, Any]) -> bool:
        """Whether a call is of the kind that kernels are for."""
        if (
            query.dtype is not getattr(torch, self.call.dtype)
            or query.device.type != self.device
            or query.requires_grad
            or causal != self.call.causal
        ):
            return False
        return STRANGE.isdisjoint(kwargs) or not any(kwargs.get(name) is not None for name in STRANGE)


def unseen() -> bool:
    """Whether nobody watches which operators are called: no tracer, no mode of dispatch."""
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing() and torch._C._len_torch_dispatch_stack() == 0
