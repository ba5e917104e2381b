"""Prove what recognition says of masks and biases: the spec's expressions against the tensors that the model computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.dims import Dim, solved
from attnopt.ir.dims import evaluate as number_of
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Expr, Index, Load, walk
from attnopt.ir.graph import Value
from attnopt.ir.layout import Operand
from attnopt.ir.site import Site

HIDDEN = -1e30


def symbols(host: Any, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of the graph at these inputs."""
    sizes: dict[str, int] = {}
    for value in host.graph.inputs:
        for dim, size in zip(value.shape or (), inputs[value.name].shape, strict=True):
            if (found := solved(dim, int(size))) is not None:
                sizes[found[0]] = found[1]
    return sizes


class Checked:
    """One site on one set of inputs: what it computes by its tensors, and what its spec says."""

    def __init__(self, host: Any, site: Site, inputs: Mapping[str, Tensor]) -> None:
        self.site, self.sizes = site, symbols(host, inputs)
        self.batch, self.heads, self.queries, self.keys = (self.number(site.size(axis)) for axis in "bhqk")
        form = site.tensor_form
        operands = [*site.operands.values(), *(form.operands.values() if form else ())]
        held = list(dict.fromkeys(base(o.value) for o in operands if not base(o.value).is_constant))
        self.data = dict(zip(held, host.tap(held, inputs), strict=True)) if held else {}

    def number(self, dim: Dim) -> int:
        return number_of(dim, self.sizes)

    def tensor(self, value: Value) -> Tensor:
        if value.is_constant:
            return value.load()
        shape = [self.number(d) for d in value.shape]
        return self.data[base(value)].reshape(shape)

    def arranged(self, operand: Operand) -> Tensor:
        """An operand as [B|1, H|1, Q|1, K|1]."""
        axes = self.site.axes
        groups = [axes["b"], (*axes["g"], *axes["r"]), axes["q"], axes["k"]]
        present = [axis for group in operand.layout for axis in group]
        tensor = self.tensor(operand.value).reshape([self.number(a.size) for a in present])
        wanted = [axis for group in groups for axis in group if axis in present]
        tensor = tensor.permute([present.index(a) for a in wanted])
        lengths = [[self.number(a.size) if a in present else 1 for a in group] for group in groups]
        tensor = tensor.reshape([n for group in lengths for n in group] or [1])
        for i, group in enumerate(groups):  # a group of which only some axes vary is repeated along the others
            whole = [self.number(a.size) for a in group]
            if any(lengths[i][j] != whole[j] for j in range(len(group))) and max(lengths[i], default=1) > 1:
                start = sum(len(g) for g in lengths[:i])
                tensor = tensor.expand(*(tensor.shape[:start]), *whole, *tensor.shape[start + len(group) :])
                lengths[i] = whole
        return tensor.reshape([torch.Size(group).numel() for group in lengths])

    def by_tensors(self) -> tuple[Tensor, Tensor]:
        """(what is added to the scores, which keys are seen), both [B, H, Q, K]."""
        form = self.site.tensor_form
        shape = (self.batch, self.heads, self.queries, self.keys)
        if form is None:
            return torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
        loaded = {name: self.arranged(o) for name, o in form.operands.items()}
        total = sum((direct(b, loaded) for b in form.biases), torch.zeros(())).expand(shape)
        seen = torch.ones(shape, dtype=torch.bool) if form.mask is None else direct(form.mask, loaded).bool().expand(shape)
        return total, seen & (total > HIDDEN)

    def by_spec(self) -> tuple[Tensor, Tensor]:
        spec, shape = self.site.spec, (self.batch, self.heads, self.queries, self.keys)
        offset = 0 if spec.offset is None else int(evaluate(spec.offset.expr(0), Grid(1, 1, self.queries, self.keys)))
        grid = Grid(*shape, offset=offset, sizes=self.sizes)
        loaded = {name: self.tensor(o.value) for name, o in self.site.operands.items()}
        total = sum((evaluate(b, grid, loaded) for b in spec.biases), torch.zeros(())).expand(shape)
        seen = torch.ones(shape, dtype=torch.bool)
        if spec.mask is not None:
            seen = evaluate(spec.mask, grid, loaded).bool().expand(shape)
        return total, seen & (total > HIDDEN)

    def require_equal(self) -> None:
        added, seen = self.by_tensors()
        said, shown = self.by_spec()
        assert torch.equal(seen, shown), f"{self.site.spec}: {int((seen != shown).sum())} pairs differ"
        gap = (added.double() - said.double()).abs()[seen]
        assert gap.numel() == 0 or float(gap.max()) < 1e-5, f"{self.site.spec}: biases differ by {float(gap.max())}"


def base(value: Value) -> Value:
    """The value that the host holds, for one that is only a reshape of it."""
    while value.handle is None and value.producer is not None and value.producer.op == "reshape":
        value = value.producer.inputs[0]
    return value


def direct(expr: Expr, loaded: Mapping[str, Tensor]) -> Tensor:
    """A raw expression over tensors that are laid out as [B, H, Q, K] already."""
    from attnopt.ir.evaluate import FUNCTIONS

    if isinstance(expr, Load):
        return loaded[expr.operand]
    if not hasattr(expr, "op"):
        return torch.tensor(expr.value)
    return FUNCTIONS[expr.op](*(direct(a, loaded) for a in expr.args))


def is_lifted(site: Site) -> bool:
    """Whether no mask or bias of the spec reads a tensor over queries and keys element by element."""
    exprs = [*site.spec.biases, *([site.spec.mask] if site.spec.mask is not None else [])]
    loads = [e for x in exprs for e in walk(x) if isinstance(e, Load)]
    return not any({"k"} < {i.name for i in e.indices if isinstance(i, Index)} & {"k", "q", "row"} for e in loads)


def check(host: Any, sites: Any, inputs: Mapping[str, Tensor]) -> None:
    for site in sites:
        Checked(host, site, inputs).require_equal()
