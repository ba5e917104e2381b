"""Site, Refusal, and the protocols of a host: what patterns find, passes read, and codegen writes through."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from attnopt.ir.clause import Clause
from attnopt.ir.dims import Dim, Shape
from attnopt.ir.expr import Expr
from attnopt.ir.graph import Graph, Node, Source, Value
from attnopt.ir.layout import Group, Layout, Operand, size_of
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class Refusal:
    """Why something was not done, as a value: the reason, and the node (or spec, or name) at fault.

    reached: the furthest point of the grammar that was passed. remedy: what would make it match.
    """

    reason: str
    at: Any = None
    reached: str = ""
    remedy: str = ""

    @property
    def node(self) -> str:
        return getattr(self.at, "name", "") or ("" if self.at is None else str(self.at))

    @property
    def source(self) -> Source:
        return getattr(self.at, "source", Source())

    def __str__(self) -> str:
        where = f" (at {self.node})" if self.node else ""
        return f"{self.reason}{where}"


@dataclass(frozen=True)
class TensorForm:
    """How the graph itself holds biases and mask: as tensors, which a kernel may read while the spec still says the same.

    biases and mask load `operands` as [B|1, H|1, Q|1, K|1]; `stands_for` are the spec's own score terms, mask and empty rows.
    """

    biases: tuple[Expr, ...]
    mask: Expr | None
    empty_row: str
    operands: Mapping[str, Operand]
    stands_for: tuple[tuple[Clause, ...], Expr | None, str]

    def says(self, spec: AttentionSpec) -> bool:
        return self.stands_for == (spec.score, spec.mask, spec.empty_row)


@dataclass(frozen=True)
class Site:
    """One attention found in a graph.

    axes: the logical axes: b, g (key/value head), r (query heads per key head), q, k, d, e (value width); h is g then r.
    q, k, v, output: operands with their layouts over those axes; `operands` are the others that the spec loads, by name, one index
    for each dimension.
    codes: where k and v hold a cache as the spec's clause stores it, its scales and zero points, named as in `kv_cache.Cache`, and the
    exact tokens beside them.
    weights_used: the attention weights themselves are read elsewhere, so no fused kernel can stand in.
    nodes: canonical nodes that a replacement makes useless. steps: names of the rewrites that made this site.
    """

    name: str
    spec: AttentionSpec
    axes: Mapping[str, Group]
    q: Operand
    k: Operand
    v: Operand
    output: Operand
    operands: Mapping[str, Operand] = field(default_factory=dict)
    tensor_form: TensorForm | None = None
    codes: Mapping[str, Value] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()
    source: Source = Source()
    weights_used: Node | None = None
    steps: tuple[str, ...] = ()

    def size(self, axis: str) -> Dim:
        """Size of b, h, g, r, q, k, d or e."""
        group = (*self.axes["g"], *self.axes["r"]) if axis == "h" else self.axes[axis]
        return size_of(group)

    @property
    def shape(self) -> dict[str, Dim]:
        return {axis: self.size(axis) for axis in "bhgqkde"}

    @property
    def reads(self) -> tuple[Operand, ...]:
        """Every tensor that a kernel for this site may read."""
        held = () if self.tensor_form is None else self.tensor_form.operands.values()
        return (self.q, self.k, self.v, *self.operands.values(), *held)

    def with_step(self, step: str, spec: AttentionSpec | None = None) -> Site:
        return replace(self, spec=spec or self.spec, steps=(*self.steps, step))

    def on_codes(self, cache: Clause, sides: Mapping[str, Value], codes: Mapping[str, Value]) -> Site:
        """The same attention on a cache as its clause stores it. sides: k, v or both as [B, G, K, bytes of a row]; codes: the field."""
        a = self.axes
        layouts = {"k": (a["b"], a["g"], a["k"], a["d"]), "v": (a["b"], a["g"], a["k"], a["e"])}
        k, v = (Operand(sides[n], layouts[n]) if n in sides else held for n, held in (("k", self.k), ("v", self.v)))
        return replace(self, spec=self.spec.with_(cache=cache), k=k, v=v, codes=codes)

    def reading(self, instead: Mapping[Value, Value]) -> Site:
        """The same attention of other values, where some stand in place of those that it reads."""

        def current(operand: Operand) -> Operand:
            return Operand(instead.get(operand.value, operand.value), operand.layout)

        loads = {name: current(operand) for name, operand in self.operands.items()}
        form = self.tensor_form
        if form is not None:
            form = replace(form, operands={name: current(operand) for name, operand in form.operands.items()})
        return replace(self, q=current(self.q), k=current(self.k), v=current(self.v), operands=loads, tensor_form=form)


RECEIVED = (
    "received"  # of a site's codes: what the last tokens of its cache were given, [B, G, block, 1], which its kernel says too
)


class NotIsolated(Exception):
    """Internal: a part of a model reads more than the values it was cut out between, so it cannot run on its own."""


class Builder(Protocol):
    """Writes new nodes into a host just before a site's output. Values go in and come out; the host keeps their handles."""

    def emit(self, op: str, *inputs: Value | None, shape: Shape, dtype: str = "", **attrs: Any) -> Value:
        """A node of the canonical vocabulary (layout, elementwise, matmul, softmax, …) in the host's dialect."""
        ...

    def call(self, target: Any, *inputs: Any, shape: Shape, dtype: str = "", **attrs: Any) -> Value:
        """A node of the host's dialect: a torch operator overload, or "domain::Operator" of ONNX. None inputs are absent."""
        ...

    def constant(self, data: Tensor | float | int | bool, dtype: str) -> Value:
        """A tensor stored in the model."""
        ...


Runner = Callable[[Mapping[str, Tensor]], list[Tensor]]


class Host(Protocol):
    """Where a model lives. A pass never knows which host it is in."""

    @property
    def kind(self) -> str:
        """ "torch" or "onnx"."""
        ...

    @property
    def graph(self) -> Graph: ...

    @property
    def output_names(self) -> list[str]:
        """Of what the model returns, in order."""
        ...

    def copy(self) -> Host:
        """An independent host with the same graph and equal names; weights may be shared, neither side changes them."""
        ...

    def builder(self, before: Node) -> Builder: ...

    def replace(self, old: Value, new: Value) -> None:
        """Let every user of `old` (and the graph outputs) read `new`."""
        ...

    def refuses_change(
        self, changes: Collection[str], sites: Collection[Site], shapes: Mapping[str, Mapping[str, int]]
    ) -> Refusal | None:
        """None where the host can hold what a rewrite changes (words of a candidate) of these sites; else why not.

        shapes: sizes of the axes of a site afterwards, by its name, where they change.
        """
        ...

    def caches(self, site: Site) -> bool:
        """Whether keys and values of this site are kept for later calls beside the graph, where no node of it shows that."""
        ...

    def refuses_drop(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> Refusal | None:
        """None where the model can do without these inputs and outputs; else why its signature must keep them."""
        ...

    def drop(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> None:
        """Take the past (inputs) and present (outputs) of layers that were removed out of what the model takes and returns.

        What is left of a numbered family moves up. Sizes that were read from a dropped input are read elsewhere from `finish` on.
        """
        ...

    def refuses_split(
        self, inputs: Sequence[Value], outputs: Sequence[Value], parts: Sequence[Sequence[tuple[str, Shape, str]]] = ()
    ) -> Refusal | None:
        """None where several tensors can stand where the model takes or returns one of these; else why its signature must stay.

        parts: for each input what it would become, as `split_input` takes it, where sizes of it are computed.
        """
        ...

    def split_input(
        self, value: Value, parts: Sequence[tuple[str, Shape, str]], made: Callable[[Tensor], Sequence[Tensor]]
    ) -> list[Value]:
        """Take several tensors (word, shape, dtype) in place of one, from `finish` on; `made` makes them of what was given before.

        In torch they are a tuple where the tensor was; in ONNX the first keeps its name, the others add their word to it.
        """
        ...

    def split_outputs(self, parts: Mapping[Value, Sequence[tuple[str, Value]]]) -> None:
        """Return several values (word, value) in place of one, as `split_input` takes them.

        To be called once before `finish`, and not together with `drop`.
        """
        ...

    def adapt(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named inputs of the model as it was opened, as those that it takes now."""
        ...

    def finish(self) -> None:
        """Remove nodes that nothing reads, verify the host's own invariants, and lift `graph` anew."""
        ...

    def runner(self) -> Runner:
        """A callable from named inputs to the list of outputs, as the target runtime runs it.

        It takes the inputs of the model as it was opened as well: `adapt` makes of them those that it takes now.
        """
        ...

    def tap(self, values: Sequence[Value], inputs: Mapping[str, Tensor]) -> list[Any]:
        """What these values hold when the model runs on these inputs."""
        ...

    def tapper(self, values: Sequence[Value]) -> Callable[[Mapping[str, Tensor]], list[Any]]:
        """`tap` for many inputs: made once, then called with each. Raises NotIsolated for what cannot be tapped."""
        ...

    def isolate(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> Callable[[Sequence[Any]], list[Any]]:
        """The part of the model between these values as a callable of its own, to be timed. Raises NotIsolated."""
        ...

    def set_constant(self, value: Value, data: Tensor) -> None:
        """Store other data of the same shape in place of a constant, for all that read it here; other hosts keep theirs."""
        ...

    def set_input(self, node: Node, value: Value, data: Tensor) -> None:
        """Let this node alone read other data of the same shape in place of a constant, which others may go on reading."""
        ...

    def quantize_linears(
        self, nodes: Sequence[Node], factors: Mapping[str, Tensor] | None = None, inputs: Mapping[str, Value] | None = None
    ) -> None:
        """Store the constant weights of these linear or matmul nodes as int8; their inputs are quantised on the fly. Look-ups among the
        nodes, in rows of the weight of one of them, read its codes.

        factors: by node name, what each input channel of the weight [in] is multiplied by first. inputs: what is read instead.
        """
        ...

    def refuses_rounded(self, node: Node, format: Any) -> Refusal | None:
        """None where the layer can hold its weight in this format (`rounding.WeightFormat`), on this host's runtime; else why not.

        Of a look-up: whether it can read its rows from the codes of a layer that holds the table so.
        """
        ...

    def store_rounded(self, weights: Mapping[str, Any], inputs: Mapping[str, Value] | None = None) -> None:
        """Store weights in few bits (`rounding.RoundedWeight`, by node name): of layers that did not refuse, and of tables.

        Those of layers are [out, in], tables [rows, channels]; a look-up that is given the same one as a layer reads the layer's codes.
        inputs: by node name, what the layer reads instead.
        """
        ...


def arrange(builder: Builder, operand: Operand, target: Sequence[Group], *, broadcast: bool = False) -> Value:
    """Bring an operand to dimensions that hold the target groups, with as few nodes as possible.

    Axes of the target that the operand lacks become size 1, or are repeated with broadcast=True.
    """
    value, layout = operand.value, operand.layout
    present = [axis for group in layout for axis in group]
    wanted = [axis for group in target for axis in group if axis in operand.axes]
    dtype = value.dtype
    if wanted != present:
        atomic: Layout = tuple((axis,) for axis in present)
        if atomic != layout:
            value = builder.emit("reshape", value, shape=tuple(axis.size for axis in present), dtype=dtype)
        perm = tuple(present.index(axis) for axis in wanted)
        value = builder.emit("permute", value, shape=tuple(axis.size for axis in wanted), dtype=dtype, perm=perm)
        layout = tuple((axis,) for axis in wanted)
    kept: list[Group] = [tuple(axis for axis in group if axis in operand.axes) for group in target]
    full: list[Group] = [tuple(group) for group in target]
    if broadcast and kept != full and any(kept[i] and kept[i] != full[i] for i in range(len(full))):
        # A group lacks some of its axes: lay every axis out on its own, repeat, then merge.
        atoms = [axis for group in full for axis in group]
        value = builder.emit("reshape", value, shape=tuple(a.size if a in operand.axes else 1 for a in atoms), dtype=dtype)
        value = builder.emit("expand", value, shape=tuple(a.size for a in atoms), dtype=dtype)
        return builder.emit("reshape", value, shape=tuple(size_of(g) for g in full), dtype=dtype)
    if tuple(kept) != layout:
        same = [group for group in kept if group] == [group for group in layout if group] and value.shape is not None
        held = iter([dim for dim, group in zip(value.shape or (), layout, strict=True) if group] if same else ())
        # Where only dimensions of size 1 come or go, the others keep their own size: it may be 1 where the axis is longer.
        value = builder.emit(
            "reshape", value, shape=tuple(next(held, 1) if same and g else size_of(g) for g in kept), dtype=dtype
        )
    if broadcast and kept != full:
        value = builder.emit("expand", value, shape=tuple(size_of(g) for g in full), dtype=dtype)
    return value
