"""A torch operator of ours in place of a site: it takes q, k, v, the operands that the spec loads, and the spec as text.

site   ->   torch.ops.attnopt.NAME(q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E], operands, "softmax causal & window(512)")
"""

from __future__ import annotations

from typing import Any

from attnopt.ir.graph import Value
from attnopt.ir.layout import Operand, size_of
from attnopt.ir.site import Builder, Site, arrange


def call_operator(operator: Any, site: Site, builder: Builder, between: tuple[Any, ...] = ()) -> Value:
    """The output in the layout of the site's own. Key and value heads stay grouped; the operator is registered by its module.

    between: what the operator takes after v and before the operands.
    """
    a = site.axes
    heads = (*a["g"], *a["r"])
    q = arrange(builder, site.q, [a["b"], heads, a["q"], a["d"]], broadcast=True)
    k = arrange(builder, site.k, [a["b"], a["g"], a["k"], a["d"]], broadcast=True)
    v = arrange(builder, site.v, [a["b"], a["g"], a["k"], a["e"]], broadcast=True)
    layout = (a["b"], heads, a["q"], a["e"])
    loaded = [site.operands[name].value for name in site.spec.operands]
    shape = tuple(size_of(group) for group in layout)
    out = builder.call(operator, q, k, v, *between, loaded, str(site.spec), shape=shape, dtype=site.q.value.dtype)
    return arrange(builder, Operand(out, layout), site.output.layout)


def cache_parts(site: Site) -> tuple[Value | None, ...]:
    """What an operator of few queries takes of a cache beside keys and values: scales, zero points; never pages or lengths."""
    named = ("k_scales", "k_zeros", "v_scales", "v_zeros", "pages", "lengths")
    return tuple(site.codes.get(name) for name in named)
