"""One attention that is checked and timed: its spec, its tensors, and the work that it cannot do without.

Case("prefill", "window", width=128, q_len=16384, kv_len=16384, batch=1, heads=16, key_heads=16)
    ->   softmax scale(0.0883…) causal & window(1024)        q, k, v bf16 [1, 16, 16384, 128]        0.13 TFLOP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from attnopt.ir.kv_cache import Cache
from attnopt.passes.quantize.sage_attention import precision

DTYPE = torch.bfloat16
WINDOW, SOFTCAP, DOCUMENTS, GROUP = 1024, 30.0, 8, 64
TERMS = {
    "full": "",
    "causal": "causal",
    "window": "causal & window({window})",
    "documents": "causal & document",
    "softcap": f"softcap({SOFTCAP}) causal",
    "alibi": "add(alibi) causal",
}
MASKS = tuple(TERMS)
STORED = {
    "bf16": "",
    "int8": "cache(k=int8, v=int8, scales=fp16)",
    "int4": f"cache(k=int4, v=int4, group={GROUP}, scales=fp16)",
}


ROUNDED = {"": "", "int8 fp16": str(precision("int8", "fp16")), "int8 fp8": str(precision("int8", "fp8"))}
Family = tuple[str, str, int, str, str]


@dataclass(frozen=True)
class Case:
    """kind: "prefill" or "decode". mask: a key of TERMS. width: of a head. cache: a key of STORED, how keys and values are held.

    rounded: a key of ROUNDED, the types of q and k, and of weights and v, in the products.
    """

    kind: str
    mask: str
    width: int
    q_len: int
    kv_len: int
    batch: int
    heads: int
    key_heads: int
    cache: str = "bf16"
    window: int = WINDOW
    rounded: str = ""

    @property
    def name(self) -> str:
        if self.kind == "prefill":
            return f"prefill {f'{self.mask} {self.rounded}'.strip()} d{self.width} {tokens(self.kv_len)} x {self.batch}"
        return f"decode {self.cache} d{self.width} {self.heads // self.key_heads}:1 {tokens(self.kv_len)} x {self.batch}"

    @property
    def spec(self) -> str:
        terms = (
            f"softmax scale({self.width**-0.5!r})",
            TERMS[self.mask].format(window=self.window),
            STORED[self.cache],
            ROUNDED[self.rounded],
        )
        return " ".join(term for term in terms if term)

    @property
    def family(self) -> Family:
        """Cases of one family run one kernel."""
        return self.kind, self.mask, self.width, self.cache, self.rounded

    def small(self, length: int = 48) -> Case:
        """The same attention at a size that an interpreter computes in a second."""
        q_len = min(self.q_len, length)
        heads = max(2, self.heads // self.key_heads)
        return replace(
            self, q_len=q_len, kv_len=length, batch=min(self.batch, 2), heads=heads,
            key_heads=heads * self.key_heads // self.heads, window=min(self.window, length // 3),
        )  # fmt: skip


def tokens(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


@dataclass(frozen=True)
class Data:
    """q [B, H, Q, D], keys and values [B, G, K, D] as they are stored, and the tensors that the spec loads, by name."""

    q: Tensor
    cache: Cache
    operands: Mapping[str, Tensor]

    @property
    def k(self) -> Tensor:
        return self.cache.k

    @property
    def v(self) -> Tensor:
        return self.cache.v

    @cached_property
    def lengths(self) -> list[int]:
        """Of the documents of all rows of the batch, one after the other, or of the whole rows."""
        if "document" not in self.operands:
            return [self.q.shape[2]] * self.q.shape[0]
        return [int(n) for row in self.operands["document"] for n in torch.unique_consecutive(row, return_counts=True)[1]]

    @cached_property
    def starts(self) -> Tensor:
        """Where each of them starts, and the end: int32."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.q.device)

    @cached_property
    def rows(self) -> list[Tensor]:
        """q, k and v as packed sequences [rows of all, H, D]."""
        return [x.transpose(1, 2).flatten(0, 1).contiguous() for x in (self.q, self.k, self.v)]


def make(case: Case, device: torch.device, generator: torch.Generator | None, dtype: torch.dtype = DTYPE) -> Data:
    """Fresh random tensors, made where they are needed."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    q = random(case.batch, case.heads, case.q_len, case.width)
    shape = case.batch, case.key_heads, case.kv_len, case.width
    if case.cache == "bf16":
        cache = Cache(random(*shape), random(*shape))
    else:
        (k, k_scales, k_zeros), (v, v_scales, v_zeros) = (codes(case.cache, shape, device, generator) for _ in "kv")
        cache = Cache(k, v, k_scales, k_zeros, v_scales, v_zeros)
    operands: dict[str, Tensor] = {}
    if case.mask == "alibi":
        operands["slopes"] = torch.pow(2.0, -8.0 * torch.arange(1, case.heads + 1, device=device) / case.heads)
    if case.mask == "documents":
        operands["document"] = documents(case, device, generator)
    return Data(q, cache, operands)


def codes(
    storage: str, shape: tuple[int, ...], device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, with the scales and zero points of numbers between -2 and 2: a cache of half the memory is never there whole."""
    whole, width, levels = storage == "int8", shape[3], 256 if storage == "int8" else 16
    stored = (*shape[:3], width if whole else width // 2)
    low, high, dtype = (-128, 128, torch.int8) if whole else (0, 256, torch.uint8)
    made = torch.randint(low, high, stored, device=device, generator=generator, dtype=dtype)
    groups = (*shape[:3], 1 if whole else -(-width // GROUP))
    scales = torch.full(groups, 4.0 / levels, device=device, dtype=torch.float16)
    return made, scales, torch.full(groups, -levels / 2, device=device, dtype=torch.float16)


def documents(case: Case, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """int32 [B, L]: which of DOCUMENTS documents of random lengths a position is in."""
    cuts = torch.rand((case.batch, DOCUMENTS - 1), device=device, generator=generator).mul(case.kv_len).long().sort(1)[0]
    places = torch.arange(case.kv_len, device=device).expand(case.batch, -1).contiguous()
    return torch.searchsorted(cuts, places, right=True).int()


def pairs(case: Case, data: Data) -> int:
    """How many (query, key) pairs are visible in the whole batch, for one head."""
    n = case.kv_len
    if case.mask == "full":
        return case.batch * case.q_len * n
    if case.mask == "documents":
        return sum(m * (m + 1) // 2 for m in data.lengths)
    reach = min(case.window, n) if case.mask == "window" else n
    return case.batch * (reach * (reach + 1) // 2 + (n - reach) * reach)


def flops(case: Case, data: Data) -> int:
    """Of the two products over visible pairs."""
    return 4 * case.width * case.heads * pairs(case, data)


def cache_bytes(data: Data) -> int:
    """Of keys and values as they are stored, with scales and zero points: each is read at least once."""
    return sum(x.numel() * x.element_size() for x in vars(data.cache).values() if x is not None)
