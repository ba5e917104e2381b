"""Which axes of an attention the dimensions of a tensor hold, told by the indices at which it is read.

v [B*H, L, E] read at (4*b + h, 3*c + x + j - 3, e)     ->     b h | k | e         for k = q + j - w, q = 3*c + x, w = 3
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnopt.ir.dims import Dim, product
from attnopt.ir.layout import Axis, Group, Layout, size_of
from attnopt.patterns.banded.affine import Affine, Numbers, Region
from attnopt.patterns.banded.tracing import Elements


@dataclass(frozen=True)
class Placement:
    """`forms` are the axes with their indices at the elements of one numbering."""

    region: Region
    forms: Mapping[Axis, Affine]

    def layouts(self, elements: Elements) -> set[Layout]:
        """The axes of every dimension, where all of them are read at whole axes. On the diagonal of a band alone, the position of a
        query is also that of a key: then there are several answers."""
        found: set[Layout] = {()}
        for dim, index in zip(elements.value.shape or (), elements.at, strict=True):
            groups = self.groups(dim, self.region.fixed(index), elements.which)
            found = {(*layout, group) for layout in found for group in groups if not {*group} & held(layout)}
        return found

    def groups(self, dim: Dim, index: Affine, which: Numbers) -> list[Group]:
        if dim == 1:
            return [()]
        single: list[Group] = [
            (axis,) for axis, form in self.forms.items() if axis.size == dim and self.region.fixed(form).take(which).equals(index)
        ]
        # Several axes in one dimension: the outer ones step over the inner ones.
        axes = tuple(sorted((a for a in index.terms if isinstance(a, Axis) and a in self.forms), key=lambda a: -index.terms[a]))
        steps = [index.terms[axis] for axis in axes]
        mixed = len(axes) == len(index.terms) > 1 and not index.constant.any() and size_of(axes) == dim
        inner = [product(axis.size for axis in axes[i + 1 :]) for i in range(len(axes))]
        return [*single, axes] if mixed and steps == inner else single


def held(layout: Layout) -> set[Axis]:
    return {axis for group in layout for axis in group}


def along(group: Group, coordinates: Mapping[Axis, Affine]) -> Affine | None:
    """The index of a dimension that holds these axes; None where an inner size is no number."""
    total: Affine | None = None
    for axis in group:
        if total is None:
            total = coordinates[axis]
        elif isinstance(axis.size, int):
            total = total * axis.size + coordinates[axis]
        else:
            return None
    return total
