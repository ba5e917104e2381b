"""Rotate the model, count tokens by the attention that they receive, and round all linear layers by GPTQ (RSQ).

    residual stream x -> x Q, values v -> v R        H = X' diag(r) X / rows        W' -> V' on the grid, by GPTQ with H

The rotations (`passes.rotation`) change no output; weights that they spread have no outliers. r is the attention concentration
(`analysis.concentration`), each layer's own. What is no part of a layer, the head, is kept in 8 bits. Where the stream cannot be rotated
(a norm with means, a norm after the addition) only values are. The authors' rotation of what down_proj reads, at run time, is left out;
their moments are of a model whose earlier layers are rounded already, these of the original. Layers that make massive values of queries
or keys (`analysis.massive_values`) are kept in 8 bits, which is no part of RSQ; with protect=0 they are not.

Source: "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from attnopt.analysis.massive_values import FACTOR, massive_values
from attnopt.ir.graph import Node
from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.rotation import Rotated, rotated
from attnopt.passes.weight_rounding import Wish, candidate, formats, kept_codes, nodes_of
from attnopt.rounding import gptq
from attnopt.rounding.weight_format import WeightFormat

MEMORY = 8 * 2**30  # bytes of all weights in float64


@dataclass(frozen=True)
class Rsq:
    """Rotate the model, count tokens by the attention that they receive, and round all linear layers by GPTQ (RSQ).

    least: what the token that receives least counts; 1 counts all alike. seed: of the rotations. heads: whether values are rotated.
    rotate: whether anything is. rest: how layers outside of the blocks are kept. protect: how many times larger than the mean of its
    head a channel of q or k is for its layer to be kept so too.
    """

    name: str = "rsq"
    exact: bool = False
    per: Per = "model"
    smallest: int = 64
    wishes: tuple[Wish, ...] = (Wish(4, 32),)
    rest: Wish = Wish(8, 128)
    least: float = 0.005
    seed: int = 0
    rotate: bool = True
    protect: float = FACTOR
    heads: bool = True
    method: gptq.Gptq = gptq.Gptq()

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        if evidence is None:
            return Refusal("RSQ needs calibration data", group.name)
        if (needed := 8 * sum(size(n) for n in group.linears)) > MEMORY:
            return Refusal(
                f"the weights in float64 would take {needed / 2**30:.1f} GiB, more than {MEMORY / 2**30:.0f}", group.name
            )
        layers = layers_of(group)
        if not layers:
            return Refusal("no attention with known projections", group.name)
        turned = self.turned(group)
        inside = {n for _, nodes in layers for n in nodes}
        guarded = inside & protected(group, evidence, self.protect)
        kept = [formats(group, wish, self.smallest) for wish in self.wishes]
        rest = formats(group, self.rest, self.smallest)
        wide = {} if isinstance(rest, Refusal) else {n: f for n, f in rest.items() if n not in inside or n in guarded}
        plans = [{**{n: f for n, f in k.items() if n in inside}, **wide} for k in kept if not isinstance(k, Refusal)]
        if not plans:
            return next(k for k in kept if isinstance(k, Refusal))
        arrays: list[dict[str, Mapping[str, Tensor]]] = [{} for _ in plans]
        for (_, nodes), moments in zip(layers, evidence.concentrated_moments(layers, self.least), strict=True):
            for node in nodes:
                for plan, made in zip(plans, arrays, strict=True):
                    if node in plan and (why := self.round(node, plan[node], turned, moments, made)) is not None:
                        return why
        for plan, made in zip(plans, arrays, strict=True):
            for node in plan.keys() - inside:
                made[node.name] = self.method.gridding.rounded(turned.matrix(node), plan[node]).arrays()
        return [self.candidate(plan, made, turned) for plan, made in zip(plans, arrays, strict=True)]

    def round(
        self,
        node: Node,
        format: WeightFormat,
        turned: Rotated,
        moments: Mapping[str, Tensor],
        made: dict[str, Mapping[str, Tensor]],
    ) -> Refusal | None:
        weight = turned.matrix(node)
        if node.name not in moments:
            return Refusal("calibration did not see what the layer reads, or its attention", node)
        if (why := self.method.refusal(*weight.shape)) is not None:
            return why
        made[node.name] = self.method.rounded(weight, turned.moment(node, moments[node.name]), format).arrays()
        return None

    def candidate(
        self, plan: Mapping[Node, WeightFormat], arrays: Mapping[str, Mapping[str, Tensor]], turned: Rotated
    ) -> Candidate:
        how = (
            "values and residual stream rotated" if turned.stream else "values rotated" if turned.matrices else "nothing rotated"
        )
        said = f"{how}, tokens counted by the attention they receive"
        options = {"seed": self.seed, "heads": self.heads, "rotate": self.rotate}
        return candidate(self.name, "RSQ", said, plan, options=options, needs="calibration", arrays=arrays)

    def turned(self, group: Group) -> Rotated:
        return rotated(group, self.seed, self.heads) if self.rotate else Rotated()

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Changes the host of the group in place; give it a copy. Raises PlanError where the candidate came from a file."""
        codes = kept_codes(candidate, nodes_of(candidate, group.host))
        given = candidate.options
        if given["rotate"]:
            rotated(group, given["seed"], given["heads"]).write(group.host, frozenset(codes))
        group.host.store_rounded(codes)
        return group


def protected(group: Group, evidence: Evidence, factor: float) -> set[Node]:
    """The layers of a model that make massive values of queries or keys."""
    found: set[Node] = set()
    for site, block in zip(group.sites, group.blocks, strict=True) if factor else ():
        seen, heads = evidence.attention(site), (site.size("h"), site.size("g"))
        if seen is None or not all(isinstance(n, int) for n in heads):
            continue
        massive = massive_values(seen, (heads[0], heads[1], heads[1]), block.rotary, factor)  # type: ignore[arg-type]
        for name, channels in (("q", massive.q), ("k", massive.k)):
            if bool(channels.any()):
                found |= {p.node for p in block.projections(name)}
    return found


def size(node: Node) -> int:
    weight = node.inputs[1]
    return 0 if weight is None else math.prod(d for d in weight.shape or () if isinstance(d, int))


def layers_of(group: Group) -> list[tuple[Site, Sequence[Node]]]:
    """Each attention with the linear layers from its first projection up to the next attention's, or to the last writer of the stream."""
    order = {n: i for i, n in enumerate(group.host.graph.nodes)}
    starts = []
    for site, block in zip(group.sites, group.blocks, strict=True):
        first = [order[p.lowest.node] for name in "qkv" for p in block.projections(name) if p.lowest.node in order]
        if first:
            starts.append((min(first), site))
    starts.sort(key=lambda s: s[0])
    ends = [*(at for at, _ in starts[1:]), last_of(group, order)][: len(starts)]
    made: list[tuple[Site, Sequence[Node]]] = []
    for (start, site), end in zip(starts, ends, strict=True):
        made.append((site, tuple(n for n in group.linears if n in order and start <= order[n] < end)))
    return made


def last_of(group: Group, order: Mapping[Node, int]) -> int:
    """One past the last linear layer of the last block: what only a final norm's reader is, the head, comes after it."""
    stream = group.stream
    if stream is None or isinstance(stream, Refusal):
        return len(order)
    return 1 + max(order[w.node] for w in stream.writers if w.node in order)
