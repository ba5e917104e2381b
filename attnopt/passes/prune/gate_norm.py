"""Remove the attention sublayers whose queries and keys are least coupled.

    y = x + o_proj(attention(norm(x)))   ->   y = x            norm, projections and the slots of the cache go with it

    g = ||W_Q W_K'||_F      of the whole layer, each key head repeated for its queries: g^2 = tr[(W_Q' W_Q) (W_K' W_K)]
    g^2 = sum_h ||W_Q,h W_K,h'||_F^2      with `per_head`: without the products across heads, which no score is made of

Weights alone, no data. The candidates remove the 1, 2, … layers of least g; layers that hold the same weights (ALBERT) are one
decision. Not seen: W_V, W_O, what norms of queries and keys do. Which of the two g the paper takes, and whether a norm's gain is
folded in, is not known: hence the flags; biases are outside of its formula.

With calibration data and tuning each candidate has a twin, whose next writers into the residual stream are fitted to make up for what is
gone (`removal_fit`). That is no part of the source.

Source: "Data-Free Pruning of Self-Attention Layers in LLMs" (Gate-Norm).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.ir.block import Block, Joined, Lift, Projection
from attnopt.ir.graph import Value
from attnopt.ir.site import Refusal
from attnopt.ir.sublayer import Sublayer, sublayer
from attnopt.passes.candidate import FITTED, Candidate, Evidence, Group, Per
from attnopt.passes.edits.layers.removal import emptied, refuses_removal, remove
from attnopt.passes.edits.layers.removal_fit import fitted, next_writers, put

SOURCE = "Data-Free Pruning of Self-Attention Layers in LLMs"


@dataclass(frozen=True)
class GateNorm:
    """Remove the attention sublayers whose queries and keys are least coupled.

    fold_norm_gain: W stands for diag(gain) W. with_bias: biases are one more input channel. protect: so many first layers stay.
    most: the largest share of layers that a candidate removes; one always stays.
    """

    per_head: bool = False
    fold_norm_gain: bool = False
    with_bias: bool = False
    protect: int = 0
    most: float = 0.5
    name: str = "gate-norm"
    exact: bool = False
    per: Per = "model"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        decisions = self.ranked(group)
        if isinstance(decisions, Refusal):
            return decisions
        layers = len(group.sites)
        found: list[Candidate] = []
        taken: list[Sublayer] = []
        for g, sublayers in decisions:
            taken += sublayers
            if len(taken) > min(self.most * layers, layers - 1):
                break
            refusal = refuses_removal(group.host, taken)
            if refusal is not None:
                return found or refusal
            plain = self.candidate(taken, layers, g)
            found += [plain, *self.twin(plain, self.ordered(group, taken), evidence)]
        return found or Refusal(f"no layer may go: {layers} layers, {self.protect} protected, at most {self.most:g} of them")

    def candidate(self, gone: Sequence[Sublayer], layers: int, g: float) -> Candidate:
        names = [s.site.name for s in gone]
        what = f"without the attention of {len(gone)} of {layers} layers: {', '.join(names)} (g up to {g:.4g})"
        removes = tuple(node for s in gone for node in s.removed)
        return Candidate(
            self.name, False, what, SOURCE, options={"sites": names}, kind=f"{len(gone)} of {layers}", changes=("structure",),
            removes=removes, cached=emptied(gone),
        )  # fmt: skip

    def twin(self, plain: Candidate, gone: Sequence[Sublayer], evidence: Evidence | None) -> list[Candidate]:
        """The candidate whose next writers are fitted, where all of them are known and seen."""
        writers = next_writers(gone)
        if evidence is None or isinstance(writers, Refusal) or not all(evidence.sees(layer) for layer in writers):
            return []
        what = f"{plain.description}, {', '.join(layer.name for layer in writers)} fitted"
        options = {**plain.options, "fitted": True}
        return [replace(plain, description=what, kind=plain.kind + FITTED, nodes=tuple(writers), options=options, needs="tuning")]

    def ordered(self, group: Group, gone: Sequence[Sublayer]) -> list[Sublayer]:
        """In the order of the graph."""
        at = {site.name: i for i, site in enumerate(group.sites)}
        return sorted(gone, key=lambda s: at[s.site.name])

    def tune(self, candidate: Candidate, group: Group, evidence: Evidence) -> Candidate | Refusal:
        """As it is: it is fitted when it is first applied."""
        return candidate

    def arrays(self, candidate: Candidate, group: Group, evidence: Evidence) -> Mapping[str, Mapping[str, Tensor]] | Refusal:
        """The fitted weights [out, in] of the layers that write next."""
        gone: list[Sublayer] = []
        for site, block in zip(group.sites, group.blocks, strict=True):
            if site.name in candidate.options["sites"]:
                found = sublayer(group.host.graph, site, block)
                if isinstance(found, Refusal):
                    return found
                gone.append(found)
        weights = fitted(group, gone, evidence)
        return weights if isinstance(weights, Refusal) else {node.name: {"weight": w} for node, w in weights.items()}

    def ranked(self, group: Group) -> list[tuple[float, tuple[Sublayer, ...]]] | Refusal:
        """The decisions with their g, the least first. Sublayers that hold the same weights are one."""
        readable: dict[Value, list[tuple[int, Sublayer]]] = {}
        stays: set[Value] = set()
        refusals: list[Refusal] = []
        for i, (site, block) in enumerate(zip(group.sites, group.blocks, strict=True)):
            found = refuse(block) or sublayer(group.host.graph, site, block)
            key = None if block.q is None else block.q.weight
            if isinstance(found, Refusal):
                refusals.append(found)
                stays |= {key} if key is not None else set()
            elif i >= self.protect and key is not None:
                readable.setdefault(key, []).append((i, found))
            elif key is not None:
                stays.add(key)
        decisions = [
            (self.score(members[0][1].block), members[0][0], tuple(s for _, s in members))
            for key, members in readable.items()
            if key not in stays
        ]
        if not decisions and refusals:
            return refusals[0]
        return [(g, sublayers) for g, _, sublayers in sorted(decisions, key=lambda d: d[:2])]

    def score(self, block: Block) -> float:
        """g of one layer, from its weights."""
        q, k = (self.rows(getattr(block, name), block) for name in "qk")
        return gate_norm(q, k, per_head=self.per_head)

    def rows(self, layer: Projection, block: Block) -> Tensor:
        """[H, D, in], as the flags say."""
        rows = layer.rows()
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        gain = block.norm.gain() if self.fold_norm_gain and block.norm is not None else None
        rows = rows if gain is None else rows * gain.to(rows)
        bias = layer.bias_rows() if self.with_bias else None
        return rows if bias is None else torch.cat([rows, bias.to(rows)[..., None]], -1)

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it.

        Raises PlanError where it was fitted and the numbers are not there.
        """
        if candidate.options.get("fitted"):
            put(candidate, group)
        remove(group, set(candidate.options["sites"]))
        return group


def refuse(block: Block) -> Refusal | None:
    """None where queries and keys are each one linear layer of what the block reads."""
    for name, what in (("q", "queries"), ("k", "keys")):
        layer = block.part(name, Projection)
        if layer is None or layer.down is not None or any(isinstance(step, (Joined, Lift)) for step in block.streams[name]):
            at = next((m.at for m in block.missing), None if layer is None else layer.node)
            return Refusal(f"its {what} are not made by one linear layer", at)
    return None


def gate_norm(q: Tensor, k: Tensor, *, per_head: bool = False) -> float:
    """||W_Q W_K'||_F of rows q [Hq, D, in] and k [Hk, D, in], Hq a multiple of Hk; `per_head`: the root of the sum over heads."""
    heads, shared, width = len(q), len(k), q.shape[1]
    if per_head:
        grams = [(x @ x.mT).double() for x in (q, k)]
        return float((grams[0] * grams[1].repeat_interleave(heads // shared, 0)).sum().clamp(min=0).sqrt())
    of_q, of_k = ((x.flatten(0, 1) @ x.flatten(0, 1).T).double() for x in (q, k))
    # A key head stands for each of its queries: their part of the Gram of all queries is summed instead of repeating keys.
    by_key = of_q.view(shared, -1, width, shared, heads // shared, width).sum((1, 4)).reshape(shared * width, -1)
    return float((by_key * of_k).sum().clamp(min=0).sqrt())
