"""Leave out the heads of a layer that contribute least to its output.

    o = sum over heads of a_h W_O,h    ->    the same without some heads        with them go rows of q, k, v, columns of o, and cache

Importance is measured: E |a_h W_O,h|², a_h what the head attends to on calibration tokens. Query heads that share a key head go together.
With `tuning` the rows of W_O that stay are fitted anew, so that they give what all gave as nearly as possible:

    min over W  of  E |a W_O - a_kept W|²       W = (A_kk)^-1 A_k: W_O,    A = E a' a

Removing nothing is the identity; a head whose W_O is zero goes first and changes nothing.

Source: "Are Sixteen Heads Really Better than One?" (removal by importance; there its measure is a gradient); the fit is least squares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import OutOfRange
from attnopt.ir.block import Block
from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.heads.candidates import candidate_of, shared_by
from attnopt.passes.edits.heads.changes import HeadChanges, refuses_change
from attnopt.passes.edits.heads.head_map import HeadMap
from attnopt.passes.edits.heads.head_pass import HeadPass, with_fitted

SOURCE = "Are Sixteen Heads Really Better than One?"
RIDGE = 1e-6  # of the mean of what is inverted

NOT_TAPPED = Refusal("what its output projection reads cannot be tapped")


@dataclass(frozen=True)
class PruneHeads(HeadPass):
    """Leave out the heads of a layer that contribute least to its output.

    shares: of a layer's key heads that go, each with its queries, in [0, 1); one stays.
    """

    shares: tuple[float, ...] = (0.125, 0.25, 0.5)
    name: str = "prune-heads"
    exact: bool = False
    per: Per = "block"

    def __post_init__(self) -> None:
        if any(not 0 <= s < 1 for s in self.shares):
            raise OutOfRange("shares of heads to leave out in [0, 1)", f"{self.shares}")

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        if evidence is None:
            return Refusal("what heads contribute is measured on calibration data", group.name)
        if (refusal := refuses_change(group, norms="")) is not None:
            return refusal
        if any(has_heads(site) for site in group.sites):
            return Refusal("a bias or mask differs between its heads", group.name)
        seen = output_moment(group, evidence)
        if seen is None:
            return NOT_TAPPED
        block = group.blocks[0]
        assert block.k is not None
        keys, order = len(block.k.channels), ranked(block, seen)
        made: dict[int, Candidate] = {}
        for share in self.shares:
            count = min(round(share * keys), keys - 1)
            if count and count not in made:
                kept = sorted(order[count:])
                what = f"without {count} of {keys} key heads and their queries"
                kind = f"without {count} of {keys}"
                made[count] = candidate_of(self.name, group, pruned(block, kept), what, kind, SOURCE, {"kept": kept})
        return with_fitted(made.values(), group, evidence) or Refusal(f"{keys} key heads: none may go", group.name)

    def changes(self, options: Mapping[str, Any], group: Group, evidence: Evidence | None) -> HeadChanges | Refusal:
        return pruned(group.blocks[0], options["kept"])

    def fit(self, options: Mapping[str, Any], group: Group, evidence: Evidence) -> HeadChanges | Refusal:
        """What stays is what was there before: its moments are those of the model as it was, so that nothing is attended to again."""
        seen = output_moment(group, evidence)
        return NOT_TAPPED if seen is None else pruned(group.blocks[0], options["kept"], seen)


def has_heads(site: Site) -> bool:
    heads = {*site.axes["g"], *site.axes["r"]}
    held = () if site.tensor_form is None else site.tensor_form.operands.values()
    return any(o.axes & heads for o in (*site.operands.values(), *held))


def output_moment(group: Group, evidence: Evidence) -> Tensor | None:
    """E a' a of what the output projection reads [H, E, H, E], heads in their order."""
    block = group.blocks[0]
    assert block.o is not None
    whole = evidence.second_moment(block.o.node)
    if whole is None:
        return None
    at = block.o.channels.flatten()
    return whole.double()[at][:, at].reshape(*block.o.channels.shape, *block.o.channels.shape)


def ranked(block: Block, seen: Tensor) -> list[int]:
    """Key heads, those that contribute least first."""
    assert block.o is not None
    rows = block.o.rows().double()  # [H, E, out]
    own = seen.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [H, E, E]
    each = torch.einsum("hab,hao,hbo->h", own, rows, rows).unflatten(0, (-1, shared_by(block))).sum(1)
    return [int(i) for i in each.argsort(stable=True)]


def pruned(block: Block, kept: Sequence[int], seen: Tensor | None = None) -> HeadChanges:
    """These key heads and their queries stay. seen: fit the output projection on this moment."""
    assert block.q is not None and block.k is not None and block.v is not None and block.o is not None
    repeats = shared_by(block)
    queries = [k * repeats + r for k in kept for r in range(repeats)]
    wide, deep = block.o.channels.shape[1], block.k.channels.shape[1]
    o = HeadMap.kept(queries, wide) if seen is None else fitted(queries, seen)
    return HeadChanges(HeadMap.kept(queries, deep), HeadMap.kept(kept, deep), HeadMap.kept(kept, block.v.channels.shape[1]), o)


def fitted(kept: Sequence[int], seen: Tensor) -> HeadMap:
    heads, width = seen.shape[:2]
    rows = seen[list(kept)].reshape(len(kept) * width, heads * width)
    own = seen[list(kept)][:, :, list(kept)].reshape(len(kept) * width, -1)
    ridge = RIDGE * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype)
    whole = torch.linalg.solve(own + ridge, rows).reshape(len(kept), width, heads, width)
    return HeadMap(torch.arange(heads).expand(len(kept), heads), whole.permute(0, 2, 1, 3).contiguous())
