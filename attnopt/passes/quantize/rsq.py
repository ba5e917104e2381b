"""Rotate the model, count tokens by the attention that they receive, and round all linear layers by GPTQ (RSQ).

    residual stream x -> x Q, values v -> v R, what an MLP narrows -> x H      H = X' diag(r) X / rows      W' -> V' on the grid, by GPTQ

The rotations of stream and values (`passes.rotation`) change no output and cost nothing; H of what the last layer of an MLP reads is
computed while the model runs, in blocks (`edits.layers.mixed_inputs`; the authors' is of the whole width). r is the attention concentration
(`analysis.concentration`), each layer's own. What is no part of a layer, the head, is kept in 8 bits. Where the stream cannot be rotated
(a norm with means, a norm after the addition) only values are. Layers that make massive values of queries or keys
(`analysis.massive_values`) are kept in 8 bits, which is no part of RSQ; with protect=0 they are not.

The codes are found when a candidate is first applied. Moments are those of the original model; at effort "high" another candidate takes
those of the model whose earlier layers are rounded already, as the authors do, for one run of the data for each layer.

Source: "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from attnopt.analysis.massive_values import FACTOR, massive_values
from attnopt.ir.graph import Node, Value
from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.layers.attention_layers import layers_of, narrowing
from attnopt.passes.edits.layers.linear_layers import matrix
from attnopt.passes.edits.layers.mixed_inputs import mixed_inputs
from attnopt.passes.edits.layers.moments import LayerAfterLayer, moments_at_once
from attnopt.passes.rotation import Rotated, rotated, turns
from attnopt.passes.weight_rounding import Wish, candidate, formats, formats_of, kept_codes, nodes_of
from attnopt.rounding import gptq
from attnopt.rounding.hadamard import block_width
from attnopt.rounding.rounded_weight import RoundedWeight
from attnopt.rounding.weight_format import WeightFormat

MEMORY = 8 * 2**30  # bytes of all weights in float64


@dataclass(frozen=True)
class Rsq:
    """Rotate the model, count tokens by the attention that they receive, and round all linear layers by GPTQ (RSQ).

    least: what the token that receives least counts; 1 counts all alike. seed: of the rotations. heads: whether values are rotated.
    rotate: whether anything is rotated. mix: whether what the last layers of MLPs read is, at run time. rest: how layers outside of
    the blocks are kept. protect: how many times larger than the mean of its head a channel of q or k is for its layer to be kept so too.
    in_turn: whether a candidate with moments of the model rounded so far is offered, which needs effort "high".
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
    mix: bool = True
    protect: float = FACTOR
    heads: bool = True
    in_turn: bool = True
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
        inside = {n for _, nodes in layers for n in nodes}
        guarded = inside & protected(group, evidence, self.protect)
        kept = [formats(group, wish, self.smallest) for wish in self.wishes]
        rest = formats(group, self.rest, self.smallest)
        wide = {} if isinstance(rest, Refusal) else {n: f for n, f in rest.items() if n not in inside or n in guarded}
        plans = [{**{n: f for n, f in k.items() if n in inside}, **wide} for k in kept if not isinstance(k, Refusal)]
        if not plans:
            return next(k for k in kept if isinstance(k, Refusal))
        rounded = [n for n in plans[0] if n in inside]
        if (unseen := next((n for n in rounded if not evidence.sees(n)), None)) is not None:
            return Refusal("calibration did not see what the layer reads, or its attention", unseen)
        if (why := next((r for n in rounded if (r := self.method.refusal(*shape(n))) is not None), None)) is not None:
            return why
        made = [self.candidate(plan, group, in_turn=False) for plan in plans]
        return made + ([self.candidate(plan, group, in_turn=True) for plan in plans] if self.in_turn else [])

    def candidate(self, plan: Mapping[Node, WeightFormat], group: Group, in_turn: bool) -> Candidate:
        stream, values = turns(group, self.heads) if self.rotate else (False, False)
        how = "values and residual stream rotated" if stream else "values rotated" if values else "nothing rotated"
        mixed = self.mixed(group, plan)
        said = (
            f"{how}{', inputs of the last layers of MLPs mixed' if mixed else ''}, tokens counted by the attention they receive"
        )
        options = {
            "seed": self.seed, "heads": self.heads, "rotate": self.rotate, "least": self.least, "mixed": mixed, "in turn": in_turn
        }  # fmt: skip
        if not in_turn:
            return candidate(self.name, "RSQ", said, plan, options=options, needs="calibration")
        made = candidate(self.name, "RSQ", f"{said}, layer after layer", plan, options=options, needs="tuning")
        return replace(made, kind=f"{made.kind}, layer after layer")

    def mixed(self, group: Group, plan: Mapping[Node, WeightFormat]) -> dict[str, int]:
        """Blocks of the layers whose inputs are mixed, by name."""
        found = {n.name: block_width(shape(n)[1]) for n in narrowing(group) if n in plan} if self.rotate and self.mix else {}
        return {name: block for name, block in found.items() if block is not None}

    def tune(self, candidate: Candidate, group: Group, evidence: Evidence) -> Candidate | Refusal:
        """As it is: its codes are found when it is first applied, and only then do they take the time that a low effort has not."""
        return candidate

    def arrays(self, candidate: Candidate, group: Group, evidence: Evidence) -> dict[str, Mapping[str, Tensor]] | Refusal:
        given, plan, layers = candidate.options, formats_of(candidate, group.host), layers_of(group)
        turned = turned_by(given, group)
        made: dict[Node, RoundedWeight] = {}
        swept = (
            LayerAfterLayer(group, turned_by({**given, "mixed": {}}, group), turned.mixed, evidence, given["least"]).moments(
                layers, made
            )
            if given["in turn"]
            else moments_at_once(layers, turned, evidence, given["least"])
        )
        for (_, nodes), moments in zip(layers, swept, strict=True):
            for node in [n for n in nodes if n in plan]:
                if node.name not in moments:
                    return Refusal("calibration did not see what the layer reads, or its attention", node)
                made[node] = self.method.rounded(turned.matrix(node), moments[node.name], plan[node])
        for node in plan.keys() - made.keys():
            made[node] = self.method.gridding.rounded(turned.matrix(node), plan[node])
        return {node.name: weight.arrays() for node, weight in made.items()}

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Changes the host of the group in place; give it a copy. Raises PlanError for a candidate without its arrays."""
        nodes = nodes_of(candidate, group.host)
        codes = kept_codes(candidate, nodes)
        turned_by(candidate.options, group).write(group.host, frozenset(codes))
        blocks = candidate.options["mixed"]
        inputs: dict[str, Value] = {}
        for block in sorted(set(blocks.values())):
            inputs |= mixed_inputs(group.host, [n for n in nodes if blocks.get(n.name) == block], block)
        group.host.store_rounded(codes, inputs)
        return group


def turned_by(options: Mapping[str, object], group: Group) -> Rotated:
    """The model rotated as the options of a candidate say."""
    turned = rotated(group, options["seed"], options["heads"]) if options["rotate"] else Rotated()  # type: ignore[arg-type]
    blocks: Mapping[str, int] = options["mixed"]  # type: ignore[assignment]
    for node in [n for n in group.linears if n.name in blocks]:
        turned.mix(node, blocks[node.name])
    return turned


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


def shape(node: Node) -> tuple[int, int]:
    """(outputs, inputs)."""
    held = matrix(node).shape
    return held[0], held[1]
