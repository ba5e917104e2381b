"""The site that an attention is after its heads changed: its axes, its spec, and the operands that have an axis of heads.

softmax heads(8) width(64)   ->   softmax heads(8, 2) width(48, 40)          a bias [1, 8, Q, K] now holds heads as (2, 4)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attnopt.ir.clause import Clause
from attnopt.ir.expr import Const
from attnopt.ir.layout import Axis, Layout, Operand, size_of
from attnopt.ir.layout import Group as Axes
from attnopt.ir.site import Site
from attnopt.passes.edits.heads.changes import HeadChanges


def changed(site: Site, changes: HeadChanges) -> Site:
    """The site as it will be, on the values that it reads now: what its kernel has to compute."""
    axes = dict(site.axes)
    old = heads_of(site)
    heads, keys = counts(site, changes)
    if (heads, keys) != (site.size("h"), site.size("g")):
        if changes.reads:
            keys = heads
        axes["g"] = (Axis("g'", keys),)
        axes["r"] = (Axis("r'", heads // keys),) if heads != keys else ()
    if changes.k is not None and changes.up is None and changes.k.width != site.size("d"):
        axes["d"] = (Axis("d'", changes.k.width),)
    if changes.v is not None and changes.v.width != site.size("e"):
        axes["e"] = (Axis("e'", changes.v.width),)
    new = (*axes["g"], *axes["r"])
    d, e = size_of(axes["d"]), size_of(axes["e"])
    score = exact_scale(site)
    spec = site.spec.with_(
        score=score,
        heads=Clause("heads", (heads, keys) if keys != heads else (heads,)),  # type: ignore[arg-type]
        width=Clause("width", (d, e) if d != e else (d,)),  # type: ignore[arg-type]
    )
    form = site.tensor_form
    if form is not None:
        stands_for = (score, *form.stands_for[1:]) if form.says(site.spec) else form.stands_for
        form = replace(form, operands={n: regrouped(o, old, new) for n, o in form.operands.items()}, stands_for=stands_for)
    operands = {name: regrouped(o, old, new) for name, o in site.operands.items()}
    made = replace(site, spec=spec, axes=axes, tensor_form=form, operands=operands)
    q, k, v = (Operand(getattr(site, name).value, layout_of(made, name)) for name in "qkv")
    return replace(made, q=q, k=k, v=v)


def exact_scale(site: Site) -> tuple[Clause, ...]:
    """The score terms. A spec's scale has the digits of float32: in float64 the usual one is meant to all of its own."""
    score, width = site.spec.score, site.size("d")
    if site.q.value.dtype != "float64" or [c.name for c in score].count("scale") != 1 or not isinstance(width, int):
        return score
    usual = width**-0.5
    if site.spec.scale is None or abs(site.spec.scale / usual - 1) > 1e-6:
        return score
    return tuple(Clause("scale", (Const(usual),)) if c.name == "scale" else c for c in score)


def counts(site: Site, changes: HeadChanges) -> tuple[int, int]:
    """Query heads and key heads afterwards."""
    heads, keys = site.size("h"), site.size("g")
    assert isinstance(heads, int) and isinstance(keys, int)
    return (heads if changes.q is None else changes.q.heads), (keys if changes.v is None else changes.v.heads)


def layout_of(site: Site, name: str) -> Layout:
    heads = (*site.axes["g"], *site.axes["r"]) if name == "q" else site.axes["g"]
    return (site.axes["b"], heads, site.axes["q" if name == "q" else "k"], site.axes["e" if name == "v" else "d"])


def regrouped(operand: Operand, old: Axes, new: Axes) -> Operand:
    """An operand with the new axes of heads where it had the old. Raises ValueError where it has some of them only."""
    if not operand.axes & set(old) or old == new:
        return operand
    if size_of(old) != size_of(new):
        raise ValueError("a bias differs between heads, and heads go")
    layout = []
    for group in operand.layout:
        at = next((i for i in range(len(group)) if group[i : i + len(old)] == old), None)
        if at is None and set(group) & set(old):
            raise ValueError("a bias has some axes of the heads only")
        layout.append(group if at is None else (*group[:at], *new, *group[at + len(old) :]))
    return Operand(operand.value, tuple(layout))


def heads_of(site: Site) -> Axes:
    return (*site.axes["g"], *site.axes["r"])


def sizes_after(site: Site, changes: HeadChanges) -> Mapping[str, int]:
    """Sizes of the axes h, g, d and e of the site afterwards, as a candidate tells them."""
    made = changed(site, changes)
    return {axis: int(made.size(axis)) for axis in "hgde"}  # type: ignore[arg-type]
