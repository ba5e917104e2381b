"""Block: what stands around one attention. Passes that change weights read it; kernels do not need it.

    x --norm--> q, k, v projections --head norm, rotary, cache, lift--> attention --o projection--> + x

`streams["q"]` is the way from the projection to what the attention reads, in the order computed; likewise k and v. Its meaning is
`block_reference.rows`. What could not be found is listed in `missing` with reason and node: a part that is None without an entry
there is a part that the model does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, Union

import torch
from torch import Tensor

from attnopt.ir.clause import Clause
from attnopt.ir.dims import Dim
from attnopt.ir.graph import LAYOUT, Node, Value
from attnopt.ir.layout import Operand
from attnopt.ir.site import Refusal

PartT = TypeVar("PartT")


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear layer with a constant weight, stored [in, out] where `transposed` (Conv1D, MatMul, Gemm), else [out, in].

    channels [H, D]: for q, k and v the output channel of the layer that is channel d of head h, whatever the packing; for o
    the input channel. input: what the layer reads. shared: other nodes that read the weight, so that changing it changes them.
    down, down_norm: of a low-rank pair, the layer (and norm) whose result this one reads. down_cache: where it reads past ones too.
    """

    weight: Value
    bias: Value | None
    transposed: bool
    node: Node
    input: Value
    channels: Tensor
    reads: bool = False  # channels count input channels (o)
    down: Projection | None = None
    down_norm: Norm | None = None
    down_cache: CacheUpdate | None = None

    @property
    def shared(self) -> tuple[Node, ...]:
        return tuple(n for n in self.weight.users if n is not self.node and not leads_to(n, self.node))

    @property
    def size(self) -> tuple[Dim, Dim]:
        """(in, out) of the whole layer."""
        first, second = self.weight.shape or (0, 0)
        return (first, second) if self.transposed else (second, first)

    @property
    def packed(self) -> bool:
        """Whether the layer has channels that this operand does not use."""
        return self.channels.unique().numel() != self.size[0 if self.reads else 1]

    @property
    def for_all_heads(self) -> bool:
        """Whether all heads read the same channels."""
        return len(self.channels) > 1 and bool((self.channels == self.channels[0]).all())

    @property
    def lowest(self) -> Projection:
        """The layer that reads the hidden states: of a low-rank pair the first."""
        return self if self.down is None else self.down

    @property
    def range(self) -> tuple[int, int] | None:
        """[start, stop) where the channels are neighbours in order; None where they are interleaved, repeated or permuted."""
        flat = self.channels.reshape(-1)
        start = int(flat[0])
        return (start, start + flat.numel()) if torch.equal(flat, torch.arange(start, start + flat.numel())) else None

    def matrix(self) -> Tensor:
        """The weight of the whole layer as [out, in]."""
        assert self.weight.load is not None
        held = self.weight.load()
        return held.mT if self.transposed else held

    def rows(self) -> Tensor:
        """The weight of this operand: [H, D, in], or [H, D, out] for o."""
        return (self.matrix().mT if self.reads else self.matrix())[self.channels]

    def bias_rows(self) -> Tensor | None:
        """The bias of this operand [H, D]; for o that of the whole layer [out]."""
        if self.bias is None or self.bias.load is None:
            return None
        held = self.bias.load().reshape(-1)
        return held if self.reads else held[self.channels]


@dataclass(frozen=True, eq=False)
class Norm:
    """x -> (x - mean) / deviation (layer), x / root mean square (rms), x / length (l2); times weight + shift, plus bias.

    eps is added to the mean (or sum) of squares; with `floor` it is the least length instead.
    """

    kind: str
    input: Value
    output: Value
    eps: float
    weight: Value | None = None
    bias: Value | None = None
    shift: float = 0.0  # 1 where the model stores the gain less one
    floor: bool = False

    def gain(self) -> Tensor | None:
        return None if self.weight is None or self.weight.load is None else self.weight.load().reshape(-1) + self.shift

    def offset(self) -> Tensor | None:
        return None if self.bias is None or self.bias.load is None else self.bias.load().reshape(-1)

    def __str__(self) -> str:
        return f"{self.kind}_norm" + " (1 + weight)" * (self.shift == 1.0)


@dataclass(frozen=True, eq=False)
class HeadNorm:
    """A norm of queries or keys, per head or over `all` heads together; channels [H, D] index its weight."""

    norm: Norm
    axis: str
    channels: Tensor

    def __str__(self) -> str:
        return f"{self.norm} {'per head' if self.axis == 'head' else 'over all heads'}"


@dataclass(frozen=True, eq=False)
class Rotary:
    """Channels first … first + dims of each head turn by position * inv_freq; the rest passes.

    interleaved: channel 2i turns with 2i + 1; otherwise i with i + dims / 2. inv_freq [dims / 2] as the model holds it;
    base where inv_freq is base^(-2i / dims) to the precision of float32, else None. scaling multiplies the turned channels.
    positions: what is multiplied by inv_freq, with its layout; None where a constant table holds row numbers. on: q, k or both.
    """

    dims: int
    first: int
    interleaved: bool
    inv_freq: Tensor
    base: float | None
    scaling: float
    positions: Operand | None
    on: tuple[str, ...] = ()

    def same(self, other: Rotary) -> bool:
        """Whether both turn alike; positions may be laid out differently."""
        mine, others = (
            (r.dims, r.first, r.interleaved, r.scaling, None if r.positions is None else r.positions.value) for r in (self, other)
        )
        return mine == others and torch.equal(self.inv_freq, other.inv_freq)

    @property
    def clause(self) -> Clause:
        """The clause of a spec that would read its operands before the rotation; `inv_freq` is an operand without a base."""
        options = {"pairs": "interleaved" if self.interleaved else "half", "first": self.first}
        angles = {"base": self.base} if self.base is not None else {"angles": "inv_freq"}
        return Clause("rotary", (self.dims,), tuple({**angles, **options}.items()))

    def __str__(self) -> str:
        base = f"base {self.base:g}" if self.base is not None else "own inv_freq"
        start = f" from {self.first}" if self.first else ""
        scaled = f" scaling {self.scaling:.7g}" if self.scaling != 1.0 else ""
        return f"rotary {self.dims}{start} {'interleaved' if self.interleaved else 'half'} {base}{scaled}"


@dataclass(frozen=True, eq=False)
class Scale:
    """A constant factor."""

    factor: float


@dataclass(frozen=True, eq=False)
class Lift:
    """Rows of each head times a constant matrix of its own, [1, H, r, D]: few channels as they are kept, D as attention reads them."""

    node: Node
    weight: Value

    def up(self) -> Tensor:
        """[H, r, D]."""
        assert self.weight.load is not None
        return self.weight.load()[0]

    def __str__(self) -> str:
        return f"lifted from {(self.weight.shape or ())[2]} channels"


@dataclass(frozen=True, eq=False)
class CacheUpdate:
    """`concat`: past, then new rows, along `axis`. `scatter`: new rows take the places `indices` of a fixed cache.

    past is an operand with its layout. present: the result where it leaves the graph, itself or cut to a window.
    """

    kind: str
    past: Operand
    new: Value
    axis: int
    present: Value | None = None
    indices: Value | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """Channels first … first + width of each head, and the steps that make them from a layer of their own."""

    first: int
    width: int
    steps: tuple[Step, ...]


@dataclass(frozen=True, eq=False)
class Joined:
    """Heads whose channels come from several layers: in multi-head latent attention a latent part and a rotary one for all heads."""

    parts: tuple[Part, ...]


Step = Union[Projection, HeadNorm, Rotary, Scale, Lift, CacheUpdate, Joined]


@dataclass(frozen=True, eq=False)
class Residual:
    """The addition that ends the block: `node` adds `value`, the stream that entered it, to the output of the attention.

    o_norm: norm of the output before the addition. post_norm: norm after it. parallel: another branch is added as well.
    """

    value: Value
    node: Node
    o_norm: Norm | None = None
    post_norm: Norm | None = None
    parallel: bool = False
    scaled: bool = False  # a constant (layer scale, multiplier) stands between


@dataclass(frozen=True, eq=False)
class Block:
    """The surroundings of one attention. hidden: what the q projection reads, before layout operations."""

    streams: Mapping[str, tuple[Step, ...]] = field(default_factory=dict)
    o: Projection | None = None
    norm: Norm | None = None
    hidden: Value | None = None
    source: Value | None = None  # what the k projection reads: another sequence in cross attention
    residual: Residual | None = None
    missing: tuple[Refusal, ...] = ()

    def part(self, name: str, kind: type[PartT]) -> PartT | None:
        return next((step for step in self.streams.get(name, ()) if isinstance(step, kind)), None)

    def projections(self, name: str) -> tuple[Projection, ...]:
        """The layers whose channels q, k or v is made of: one, or one for each part."""
        return projections(self.streams.get(name, ()))

    @property
    def q(self) -> Projection | None:
        return self.part("q", Projection)

    @property
    def k(self) -> Projection | None:
        return self.part("k", Projection)

    @property
    def v(self) -> Projection | None:
        return self.part("v", Projection)

    @property
    def q_norm(self) -> HeadNorm | None:
        return self.part("q", HeadNorm)

    @property
    def k_norm(self) -> HeadNorm | None:
        return self.part("k", HeadNorm)

    @property
    def cache_k(self) -> CacheUpdate | None:
        return self.part("k", CacheUpdate)

    @property
    def cache_v(self) -> CacheUpdate | None:
        return self.part("v", CacheUpdate)

    @property
    def rotary(self) -> Rotary | None:
        """The rotation of q and k where both have the same (`on` says q and k), or of the one that has one."""
        found = {name: made for name in "qk" if (made := turn(self.streams.get(name, ()))) is not None}
        if len(found) == 2 and not found["q"].same(found["k"]):
            return None
        return next((replace(made, on=tuple(found)) for made in found.values()), None)

    @property
    def rotary_first(self) -> bool:
        """Whether q is turned before it is normalised."""
        kinds = [type(step) for step in self.streams.get("q", ())]
        return Rotary in kinds and HeadNorm in kinds and kinds.index(Rotary) < kinds.index(HeadNorm)

    @property
    def packed(self) -> bool:
        """Whether q, k and v are cut from one layer."""
        return None not in (self.q, self.k, self.v) and self.q.weight is self.k.weight is self.v.weight  # type: ignore[union-attr]

    @property
    def cross(self) -> bool:
        """Whether keys come from another sequence than queries."""
        return self.hidden is not None and self.source is not None and self.hidden is not self.source

    def __str__(self) -> str:
        from attnopt.ir.block_text import text

        return text(self)


def projections(steps: Sequence[Step]) -> tuple[Projection, ...]:
    """The layers at the beginning of these steps, part by part."""
    return tuple(
        layer
        for step in steps
        for layer in (
            (step,)
            if isinstance(step, Projection)
            else tuple(p for part in step.parts for p in projections(part.steps))
            if isinstance(step, Joined)
            else ()
        )
    )


def caches(steps: Sequence[Step]) -> tuple[CacheUpdate, ...]:
    """Every cache on the way: of rows, of parts of them, and of the latents that a low-rank pair stands for them."""
    below = tuple(layer.down_cache for layer in projections(steps) if layer.down_cache is not None)
    inner = tuple(cache for step in steps if isinstance(step, Joined) for part in step.parts for cache in rows_kept(part.steps))
    return (*below, *inner, *rows_kept(steps))


def rows_kept(steps: Sequence[Step]) -> tuple[CacheUpdate, ...]:
    return tuple(step for step in steps if isinstance(step, CacheUpdate))


def origin(value: Value) -> Value:
    """What a past is before layout operations, windows and casts: an input of the graph, or a constant (a learned prefix)."""
    while value.producer is not None and value.producer.op in (*LAYOUT, "slice", "cast") and value.producer.inputs[0] is not None:
        value = value.producer.inputs[0]
    return value


def turn(steps: Sequence[Step]) -> Rotary | None:
    """The rotation among these steps, or in a part of them: then of those channels of a whole head."""
    for step in steps:
        if isinstance(step, Rotary):
            return step
        for part in step.parts if isinstance(step, Joined) else ():
            if (inner := turn(part.steps)) is not None:
                return replace(inner, first=part.first + inner.first)
    return None


def leads_to(node: Node, target: Node) -> bool:
    """Whether a node only brings a weight into another form for `target`: the transpose under a product."""
    return node.op in ("permute", "reshape", "cast") and all(
        user is target or leads_to(user, target) for user in node.output.users
    )
