"""The groups that passes are shown: what must agree, read from a host.

    per="linear"   layers.0 q_proj, k_proj, v_proj (one input); gate_proj, up_proj; o_proj; down_proj; …
    per="block"    the attentions that hold the same weights, with their blocks (ALBERT has one block, twelve times)
    per="table"    the attentions that load the same stored tensor (T5's table of relative positions)

Layers agree where they read one value, because a factor moved into that value reaches all of them, and where they hold one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar

from attnopt.ir.block import Block, Norm, Projection
from attnopt.ir.graph import Graph, Node, Value
from attnopt.ir.residual_stream import ResidualStream
from attnopt.ir.site import Host, Refusal, Site
from attnopt.passes import Group
from attnopt.passes.candidate import Per
from attnopt.patterns import recognise
from attnopt.patterns.block import find_blocks
from attnopt.patterns.block.norms import norm_at
from attnopt.patterns.block.projection import root
from attnopt.patterns.block.residual_stream import residual_stream
from attnopt.plan.attend import PlainAttention
from attnopt.rounding.hadamard import BLOCK, LEAST_BLOCK, is_hadamard

T = TypeVar("T")


@dataclass(frozen=True)
class Grouping:
    """A host, from which the groups of each kind are made. Sites (those given, else recognised) and blocks are read when asked for."""

    host: Host
    given: tuple[Site, ...] | None = None
    made: dict[Per, tuple[Group, ...]] = field(default_factory=dict, compare=False)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        return recognise(self.host.graph).sites if self.given is None else self.given

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(find_blocks(self.host.graph, self.sites))

    @cached_property
    def linears(self) -> tuple[Node, ...]:
        return tuple(linears_of(self.host.graph))

    def of(self, per: Per) -> tuple[Group, ...]:
        """The groups of one kind, in the order of the graph; each has a name of its own among them."""
        if per not in self.made:
            made = {"site": self.per_site, "linear": self.per_linear, "block": self.per_block, "table": self.per_table}
            self.made[per] = named_apart(made[per]() if per in made else self.whole())
        return self.made[per]

    def per_site(self) -> list[Group]:
        return [Group(self.host, (s,), s.name, (b,)) for s, b in zip(self.sites, self.blocks, strict=True)]

    def per_linear(self) -> list[Group]:
        joined = united(self.linears, lambda n: [("weight", n.inputs[1]), ("input", root(n.inputs[0]))])  # type: ignore[arg-type]
        return [
            Group(self.host, (), label(g), linears=tuple(g), norm=self.norm_of(g), behind=partial(self.behind, tuple(g)))
            for g in joined
        ]

    def behind(self, layers: Sequence[Node]) -> tuple[Site, Block] | None:
        """The attention whose output a single layer projects, where no other block has the same layer of values."""
        pairs = list(zip(self.sites, self.blocks, strict=True))
        found = [(s, b) for s, b in pairs if b.o is not None and [b.o.node] == list(layers)]
        if len(found) != 1 or found[0][1].v is None:
            return None
        values = found[0][1].v.node
        return found[0] if sum(any(p.node is values for p in b.projections("v")) for _, b in pairs) == 1 else None

    def norm_of(self, layers: Sequence[Node]) -> Norm | None:
        sources = {root(n.inputs[0]) for n in layers}  # type: ignore[arg-type]
        return norm_at(next(iter(sources))) if len(sources) == 1 else None

    def per_block(self) -> list[Group]:
        joined = united(range(len(self.sites)), lambda i: [*weights_of(self.blocks[i]), ("site", i)])
        return [self.of_sites(indices) for indices in joined]

    def per_table(self) -> list[Group]:
        def tables(i: int) -> list[Hashable]:
            held = [o.value for o in self.sites[i].operands.values() if o.value.is_constant and o.value.scalar() is None]
            return [*held, ("site", i)]

        return [self.of_sites(indices) for indices in united(range(len(self.sites)), tables)]

    def whole(self) -> list[Group]:
        attend = PlainAttention(self.host.kind)
        return [Group(self.host, self.sites, "model", self.blocks, self.linears, stream=self.stream, attend=attend)]

    @cached_property
    def stream(self) -> ResidualStream | Refusal:
        """The residual stream, found from the first block that has one."""
        starts = (b.residual.value for b in self.blocks if b.residual is not None)
        start = next(starts, None)
        return Refusal("no attention is added to a residual stream") if start is None else residual_stream(self.host.graph, start)

    def of_sites(self, indices: Sequence[int]) -> Group:
        sites, blocks = tuple(self.sites[i] for i in indices), tuple(self.blocks[i] for i in indices)
        more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
        wanted = {p.node for b in blocks for p in around(b)}
        linears = tuple(n for n in self.linears if n in wanted)
        return Group(self.host, sites, sites[0].name + more, blocks, linears, attend=PlainAttention(self.host.kind))


def around(block: Block) -> list[Projection]:
    """The projections of a block, that of the output last."""
    found = [layer for name in "qkv" for layer in block.projections(name)]
    return [*found, *([block.o] if block.o is not None else [])]


def weights_of(block: Block) -> list[Hashable]:
    return [p.weight for p in around(block)]


def linears_of(graph: Graph) -> Iterable[Node]:
    """The layers with a constant matrix as weight: linear, or matmul. What mixes the input of one in Hadamard blocks is none."""
    for node in graph.of("linear", "matmul"):
        data, weight = node.inputs[:2]
        if (
            data is not None
            and weight is not None
            and not data.is_constant
            and weight.is_constant
            and len(weight.shape or ()) == 2
            and not mixes(weight)
        ):
            yield node


def mixes(weight: Value) -> bool:
    """Whether it is the matrix of `edits.layers.mixed_inputs`."""
    rows, columns = weight.shape or (0, 1)
    return rows == columns and rows in range(LEAST_BLOCK, BLOCK + 1) and weight.load is not None and is_hadamard(weight.load())


def united(items: Iterable[T], keys: Callable[[T], Iterable[Hashable]]) -> list[list[T]]:
    """Items that share a key, directly or through others, together; in the order of their first."""
    group_of: dict[Hashable, int] = {}
    groups: list[list[T]] = []
    for item in items:
        known = list(keys(item))
        hit = sorted({group_of[key] for key in known if key in group_of})
        home = hit[0] if hit else len(groups)
        if not hit:
            groups.append([])
        for other in hit[1:]:
            groups[home] += groups[other]
            groups[other] = []
            group_of |= {key: home for key, at in group_of.items() if at == other}
        groups[home].append(item)
        group_of |= dict.fromkeys(known, home)
    return [group for group in groups if group]


def label(layers: Sequence[Node]) -> str:
    """Where the first layer stands, by its module where the host knows it."""
    first = layers[0].source.module or layers[0].name
    return first if len(layers) == 1 else f"{first} and {len(layers) - 1} more"


def named_apart(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The same groups; of those with equal names the later ones get a number."""
    counts: dict[str, int] = {}
    made = []
    for group in groups:
        counts[group.name] = counts.get(group.name, 0) + 1
        n = counts[group.name]
        made.append(group if n == 1 else replace(group, name=f"{group.name} #{n}"))
    return tuple(made)
