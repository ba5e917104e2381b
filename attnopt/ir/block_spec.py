"""The spec that an attention has when its queries and keys are read at their projections, before norm and rotation.

    site: softmax heads(4, 2) scale(0.35)        reads q, k after rms norm and rotary
        ->  softmax heads(4, 2) norm(rms, q_gain=q_gain, k_gain=k_gain) rotary(8) scale(0.35)        reads q_proj(x), k_proj(x)

The site itself stays: kernels take rotated queries today. A pass that moves keys across the rotation starts from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from attnopt.ir.block import Block, CacheUpdate, HeadNorm, Joined, Lift, Rotary, Scale
from attnopt.ir.clause import Argument, Clause
from attnopt.ir.expr import Const, Index, Load
from attnopt.ir.layout import Operand
from attnopt.ir.site import Refusal, Site
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True, eq=False)
class Lifted:
    """The spec, the constants that it loads by name beside those of the site, and `positions` where it loads them."""

    spec: AttentionSpec
    constants: Mapping[str, Tensor]
    positions: Operand | None = None


def lifted(site: Site, block: Block) -> Lifted | Refusal:
    """The spec at the projections, or why no clause says what stands between them and the attention."""
    q, k = block.streams.get("q", ()), block.streams.get("k", ())
    if any(isinstance(step, Joined) for step in (*q, *k)):
        return Refusal("heads that are joined from several layers have no clause", site.name)
    if block.q is None or block.k is None:
        return Refusal("the projections of queries and keys are not both known", site.name)
    if any(isinstance(step, (Scale, Lift, CacheUpdate)) for step in (*q, *k)) or block.rotary_first:
        return Refusal("a factor, a matrix of each head, a cache, or a norm after the rotation has no clause", site.name)
    constants: dict[str, Tensor] = {}
    norm = norm_clause(block, constants)
    turn = rotary_clause(block, constants)
    for found in (norm, turn):
        if isinstance(found, Refusal):
            return found
    assert not isinstance(norm, Refusal) and not isinstance(turn, Refusal)
    clause, positions = turn
    return Lifted(site.spec.with_(qk_norm=norm, position=clause), constants, positions)


def norm_clause(block: Block, constants: dict[str, Tensor]) -> Clause | Refusal | None:
    found = {name: step for name, step in (("q", block.q_norm), ("k", block.k_norm)) if step is not None}
    if not found:
        return None
    first = next(iter(found.values()))
    for step in found.values():
        alike = (step.norm.kind, step.norm.eps) == (first.norm.kind, first.norm.eps)
        if not alike or step.axis != "head" or step.norm.bias is not None or (step.norm.kind == "l2" and not step.norm.floor):
            return Refusal("norms over all heads, with a bias, or that differ between queries and keys have no clause", step)
    options: dict[str, Argument] = {"eps": first.norm.eps, "on": "both" if len(found) == 2 else next(iter(found))}
    for name, step in found.items():
        gain = gains(step)
        if gain is not None:
            constants[f"{name}_gain"] = gain
            options[f"{name}_gain"] = f"{name}_gain"
    return Clause("norm", (first.norm.kind,), tuple(options.items()))


def gains(step: HeadNorm) -> Tensor | None:
    """The gain of every channel [H, D]."""
    held = step.norm.gain()
    return None if held is None else held[step.channels]


def rotary_clause(block: Block, constants: dict[str, Tensor]) -> tuple[Clause | None, Operand | None] | Refusal:
    turns = [block.part(name, Rotary) for name in "qk"]
    if turns == [None, None]:
        return None, None
    turn = block.rotary
    if turn is None or len(turn.on) != 2 or turn.scaling != 1.0:
        return Refusal("a rotation of one side only, of two kinds, or that scales has no clause", turn)
    options = dict(turn.clause.options)
    if turn.base is None:
        constants["inv_freq"] = turn.inv_freq
    source = turn.positions
    made = None if source is None else source.value.producer
    if source is None or (made is not None and made.op == "iota" and (made.attrs["start"], made.attrs["step"]) == (0, 1)):
        return Clause("rotary", (turn.dims,), tuple(options.items())), None
    batch = Index("b") if source.value.shape and source.value.shape[0] != 1 and len(source.value.shape) > 1 else Const(0)
    options |= {name: Load("positions", (batch, Index(index))) for name, index in (("q", "row"), ("k", "k"))}
    return Clause("rotary", (turn.dims,), tuple(options.items())), source
