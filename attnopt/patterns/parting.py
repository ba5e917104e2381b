"""One of several equal parts of the heads of an attention, as an attention of its own; and values side by side as wider ones.

    o = softmax(q k') v;  o[:, :4]                  ->   softmax(q[:, :4] k[:, :4]') v[:, :4]
    concat([softmax(q k') v1, softmax(q k') v2])    ->   softmax(q k') concat([v1, v2])

An operand that the parts share (values repeated for each part) is read before its repetition, and is then not cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnopt.ir.clause import EXPRESSIONS
from attnopt.ir.dims import divide
from attnopt.ir.expr import indices
from attnopt.ir.layout import Axis, AxisSpace, Group, Layout, LayoutMismatch, Operand, size_of
from attnopt.ir.site import Site, arrange
from attnopt.patterns.assembly import shortest
from attnopt.patterns.operands import candidates
from attnopt.patterns.picking import Parting, Unwritten, part_of


def part(site: Site, layout: Layout, axis: int, parts: Parting) -> tuple[Site, Layout] | None:
    """The attention of one part of a site's heads, where a slice takes it from dimension `axis` of what `layout` describes.

    None where that dimension holds anything but heads, or a mask or bias tells heads apart.
    """
    count, index = parts
    held = [a for a in layout[axis] if a.size != 1]
    heads = (*site.axes["g"], *site.axes["r"])
    if not held or not set(held) <= set(heads) or speaks_of_heads(site, heads):
        return None
    outer, size = held[0], held[0].size
    inner = None if not isinstance(size, int) else divide(size, count)
    if inner is None:
        return None
    chosen, left = Axis(f"{outer.name}.part", count), Axis(f"{outer.name}.rest", inner)
    space = AxisSpace({outer: (chosen, left) if inner != 1 else (chosen,)})

    try:
        q, k, v = (part_of(space, operand, chosen, index) for operand in (site.q, site.k, site.v))
    except LayoutMismatch:
        return None
    written = tuple(without(group, chosen) for group in space.resolve(layout))
    whole = in_space(replace(site, q=q, k=k, v=v, output=Operand(site.output.value, written)), space)
    axes = {name: without(group, chosen) for name, group in whole.axes.items()}
    return sized(replace(whole, axes=axes)), whole.output.layout


def in_space(site: Site, space: AxisSpace) -> Site:
    """The site in the axes of a space that has split some of them."""

    def own(operand: Operand) -> Operand:
        return Operand(operand.value, space.resolve(operand.layout))

    form = site.tensor_form
    return replace(
        site,
        axes={name: space.resolve_group(group) for name, group in site.axes.items()},
        q=own(site.q),
        k=own(site.k),
        v=own(site.v),
        output=own(site.output),
        operands={name: own(operand) for name, operand in site.operands.items()},
        tensor_form=form and replace(form, operands={name: own(operand) for name, operand in form.operands.items()}),
    )


def without(group: Group, axis: Axis) -> Group:
    return tuple(a for a in group if a != axis)


def speaks_of_heads(site: Site, heads: Group) -> bool:
    """Whether a mask, a bias or a factor is another one for each head."""
    held = [*site.operands.values(), *(site.tensor_form.operands.values() if site.tensor_form is not None else ())]
    said = [site.spec.mask, *(a for _, clause in site.spec.clauses for a in clause.args if isinstance(a, EXPRESSIONS))]
    return any(o.axes & set(heads) for o in held) or any("h" in indices(e) for e in said if e is not None) or bool(site.spec.plus)


def sized(site: Site) -> Site:
    """The site with head counts and widths of its axes in its spec."""
    heads = shortest("heads", site.size("h"), site.size("g"), site.size("g"))
    return replace(site, spec=site.spec.with_(heads=heads, width=shortest("width", site.size("d"), site.size("e"))))


def side_by_side(sites: Sequence[Site], layout: Layout, axis: int) -> tuple[Site, Layout] | None:
    """One attention with wider values, where the outputs of several stand side by side along their channels."""
    first = sites[0]
    if layout[axis] != first.axes["e"] or first.spec.plus or len(first.axes["e"]) != 1:
        return None
    if not all(alike(first, other) for other in sites[1:]):
        return None
    (channels,), space = first.axes["e"], AxisSpace()
    needed = (*first.axes["k"], channels)
    parts = [candidates(space, site.v.value, site.v.layout, needed)[-1].operand for site in sites]
    parts = [Operand(operand.value, space.resolve(operand.layout)) for operand in parts]
    width, wide = first.size("e"), in_space(first, space)
    assert isinstance(width, int)
    held, keys = {a for operand in parts for a in operand.axes}, wide.axes["k"]
    lead: list[Group] = [(a,) for name in "bgr" for a in wide.axes[name] if a in held]
    builder, whole = Unwritten(first.name), Axis("e", width * len(sites))
    made = [arrange(builder, operand, [*lead, keys, (channels,)], broadcast=True) for operand in parts]
    shape = (*(size_of(group) for group in lead), size_of(keys), whole.size)
    value = builder.emit("concat", *made, shape=shape, dtype=made[0].dtype, axis=len(lead) + 1)
    written = tuple((whole,) if i == axis else group for i, group in enumerate(space.resolve(layout)))
    return sized(
        replace(
            wide,
            axes={**wide.axes, "e": (whole,)},
            v=Operand(value, (*lead, keys, (whole,))),
            output=Operand(first.output.value, written),
            tensor_form=wide.tensor_form if all(site.tensor_form == first.tensor_form for site in sites) else None,
            nodes=tuple(dict.fromkeys(node for site in sites for node in site.nodes)),
            weights_used=next((s.weights_used for s in sites if s.weights_used is not None), None),
        )
    ), written


def alike(first: Site, other: Site) -> bool:
    """Whether two attentions have the same weights, and values of one width."""
    return (
        (first.q, first.k, first.spec, first.axes) == (other.q, other.k, other.spec, other.axes)
        and first.operands == other.operands
        and isinstance(first.size("e"), int)
    )
