"""What a kernel of a site is compiled for, and whether it is one for few queries on many keys, in whatever language.

q [.., 64] float16, padding bool   ->   Form(64, 64, "float16", (("padding", "bool"),))
"""

from __future__ import annotations

from attnopt.codegen.prefill_form import Form
from attnopt.ir.site import Refusal, Site

FEW = 16  # queries up to which a kernel that splits the keys is worth it; rows of the smallest product of tensor cores


def form_of(site: Site, dtype: str | None = None) -> Form | Refusal:
    """The form of the site's tensors; dtype of q, k and v, where it is not to be the model's."""
    if site.weights_used is not None:
        return Refusal("the attention weights themselves are read, and a fused kernel never makes them", site.weights_used.op)
    width, value_width = site.size("d"), site.size("e")
    if not isinstance(width, int) or not isinstance(value_width, int):
        return Refusal(f"rows of {width} and {value_width} channels: a kernel needs numbers", site.name)
    operands = tuple((name, site.operands[name].value.dtype) for name in site.spec.operands if name in site.operands)
    return Form(width, value_width, dtype or site.q.value.dtype, operands)


def decodes(site: Site) -> bool:
    """Whether few queries meet many keys here: so few are known, or they follow keys of calls before."""
    queries = site.size("q")
    return queries <= FEW if isinstance(queries, int) else site.spec.offset is not None
