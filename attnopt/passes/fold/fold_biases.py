"""Leave out the bias of keys, and move that of values behind the attention: a softmax does not see either.

    scores q (k + bk)' = q k' + q bk'        ->        q k'                 one constant for each row, which a softmax drops
    o = P (v + 1 bv) Wo + bo                 ->        P v Wo + (bv Wo + bo)          the weights P of a row sum to one

Nothing may stand between the projection and the product that would turn the bias into something that differs from key to key (a rotation,
a norm, a soft cap), and no sink may take weight. A cache that is handed in holds rows with the biases in them, so that both stay there.
One addition over all rows less for each.

Source: "Attention: Marginal Probability is All You Need?" (terms that are constant over a row drop out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from attnopt.ir.block import Block, CacheUpdate, Projection
from attnopt.ir.empty_rows import never_empty
from attnopt.ir.site import Host, Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.caches.basis import score_refusal
from attnopt.passes.edits.layers.ends import LayerEnds, ends_of
from attnopt.passes.edits.layers.writer import as_wide, drop_bias, set_bias
from attnopt.passes.rotation import head_refusal

SHIFTED = ("scale", "add")  # terms of a score that a constant over a row passes through
WHAT = {"k": "keys", "v": "values"}


@dataclass(frozen=True)
class FoldBiases:
    """Leave out the bias of keys, and move that of values behind the attention."""

    name: str = "fold-biases"
    exact: bool = True
    per: Per = "block"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        refused = {side: refuses(group, side) for side in "kv"}
        sides = [side for side, why in refused.items() if why is None]
        if not sides:
            return refused["v"] or refused["k"] or Refusal("there is no bias", group.name)
        nodes = [p.node for b in group.blocks for s in (*sides, *("o" * ("v" in sides))) for p in (layer_of(b, s),)]
        return [
            Candidate(
                self.name,
                True,
                f"no bias of {' and '.join(WHAT[s] for s in sides)} any more",
                "Attention: Marginal Probability is All You Need?",
                nodes=tuple(dict.fromkeys(nodes)),
                options={"sides": sides},
                kind=" and ".join(WHAT[s] for s in sides),
                changes=("weights",),
            )
        ]

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it."""
        sides: Sequence[str] = candidate.options["sides"]
        for block in group.blocks:
            if "v" in sides:
                behind(group.host, block)
            for side in sides:
                drop_bias(group.host, ends(layer_of(block, side)))
        return group


def refuses(group: Group, side: str) -> Refusal | None:
    """Why the biases of one side stay in a group of blocks."""
    for site, block in zip(group.sites, group.blocks, strict=True):
        why = keys_refusal(site, block) if side == "k" else values_refusal(site, block)
        if why is not None:
            return why
        layer = layer_of(block, side)
        found = ends_of(layer.node)
        if layer.bias is None:
            return Refusal(f"{WHAT[side]} have no bias", site.name)
        if layer.packed or isinstance(found, Refusal) or found.bias is not layer.bias:
            return Refusal(f"the bias of {WHAT[side]} is a part of another addition", layer.node)
    return None


def keys_refusal(site: Site, block: Block) -> Refusal | None:
    if (why := score_refusal(site, block) or sums_to_one(site)) is not None:
        return why
    if any(clause.name not in SHIFTED for clause in site.spec.score):
        return Refusal("a term of the score sees more than differences between keys", site.name)
    return cached(site, block, "k")


def values_refusal(site: Site, block: Block) -> Refusal | None:
    if (why := cached(site, block, "v") or head_refusal(site, block) or sums_to_one(site)) is not None:
        return why
    assert block.o is not None
    found = ends_of(block.o.node)
    if isinstance(found, Refusal):
        return found
    return None if found.bias is block.o.bias else Refusal("the bias of the output is not known", block.o.node)


def sums_to_one(site: Site) -> Refusal | None:
    """Why the weights of a row may not sum to one, or change when a constant is added to its scores."""
    spec = site.spec
    others = (spec.sink, spec.value_scale, spec.selection, spec.correction, spec.precision, spec.cache, spec.gate, spec.through)
    if spec.normalizer.name != "softmax" or any(c is not None for c in others) or spec.weighting or spec.plus:
        return Refusal("the weights of a row are not those of a plain softmax", site.name)
    if spec.mask is not None and spec.empty_row == "zero" and not never_empty(site):
        return Refusal("a query that sees no key gets zero, with a bias behind it would not", site.name)
    return None


def cached(site: Site, block: Block, side: str) -> Refusal | None:
    held = block.part(side, CacheUpdate)
    return None if held is None else Refusal(f"the cache that is handed in holds {WHAT[side]} with their bias", site.name)


def layer_of(block: Block, side: str) -> Projection:
    layer = block.o if side == "o" else block.part(side, Projection)
    assert layer is not None
    return layer


def ends(layer: Projection) -> LayerEnds:
    found = ends_of(layer.node)
    if isinstance(found, Refusal):
        raise RuntimeError(f"a bias cannot be folded: {found}")
    return found


def behind(host: Host, block: Block) -> None:
    """bo -> bo + bv Wo, the bias of a value head once for each query head that reads it."""
    v, o = layer_of(block, "v"), layer_of(block, "o")
    held, rows = v.bias_rows(), as_wide(o.rows())  # [G, E], [H, E, out]
    assert held is not None
    moved: Tensor = (as_wide(held).repeat_interleave(len(rows) // len(held), 0)[..., None] * rows).sum((0, 1))
    own = o.bias_rows()
    set_bias(host, ends(o), moved if own is None else moved + as_wide(own))
