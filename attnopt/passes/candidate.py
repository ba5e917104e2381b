"""What a pass returns: candidates. A pass proposes, the planner decides.

    propose(group, evidence) -> candidates | Refusal          apply(candidate, group) -> group

A `Group` is what must agree: the sites and linear layers that a rewrite changes together, in the host that they live in. `per` of a
pass says which groups it is shown:

    site     one attention                                     linear   the linear layers that read one value, or hold one weight
    block    attentions whose blocks hold the same weights     table    the attentions that load one stored table
    model    everything

A candidate says what it would change, whether that is exact, where it comes from, and what it leaves to compute, so that it can be
priced before it is applied. Applying it changes the spec of sites (a lowering computes them afterwards), or edits the host of the
group in place, never both for one site. docs/passes.md builds one pass from nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from attnopt.ir.block import Block, Norm
from attnopt.ir.graph import Node, Value
from attnopt.ir.residual_stream import ResidualStream
from attnopt.ir.site import Builder, Host, Refusal, Site
from attnopt.ir.spec import AttentionSpec

Per = Literal["site", "linear", "block", "table", "model"]
Change = Literal["kernel", "mask", "selection", "correction", "precision", "cache", "score", "weights", "structure"]
Needs = Literal["nothing", "calibration", "tuning"]
FITTED = ", fitted"  # at the end of the kind of a candidate whose twin of the kind before it is not tuned


class Attends(Protocol):
    """Writes an attention as nodes that are recognised again. Given by the planner, because passes know no kernels."""

    def refuses(self, site: Site) -> Refusal | None:
        """Why it cannot write this one; None where it can."""
        ...

    def __call__(self, site: Site, builder: Builder) -> Value:
        """The nodes that compute a site; the result has the layout of `site.output`."""
        ...


@dataclass(frozen=True)
class Group:
    """Sites and linear layers that are rewritten together, in the host that they live in.

    blocks: what stands around each of `sites`, in their order; empty where nobody read them. linears: canonical nodes with a
    constant weight. norm: the norm whose result all of `linears` read, where there is one. behind: finds the attention whose output
    the one of `linears` projects, where it does. stream: of a whole model, its residual stream, or why that is not known whole. attend:
    writes the attention of a site that a pass changes in form.
    """

    host: Host
    sites: tuple[Site, ...] = ()
    name: str = ""
    blocks: tuple[Block, ...] = ()
    linears: tuple[Node, ...] = ()
    norm: Norm | None = None
    behind: Callable[[], tuple[Site, Block] | None] = field(default=lambda: None, compare=False, repr=False)
    stream: ResidualStream | Refusal | None = None
    attend: Attends | None = None


@dataclass(frozen=True)
class Candidate:
    """One possible rewrite of a group.

    kind: the variant, equal for all groups it is offered to ("int8 smooth 0.5"): candidates of one kind are timed together.
    changes: what of a site it changes; candidates of one site that change different things may be taken together.
    nodes: the canonical nodes whose weights it changes. removes: those that are not computed any more. storage: how a linear layer
    holds its weight afterwards, by node name ("int8"). cached: what the cache of a site holds afterwards, by its name, in the words of
    a spec: "cache(k=int8, v=int8)", "" where it is gone. What a mask only hides stays in the cache, and saves no byte of it.
    scales: layers of other groups whose output channels it multiplies by powers of two. That comes first, so that what its own pass
    does to them reads the new weights; what another pass does to them, it is not taken together with.
    layers: (in, out) of a linear layer afterwards, by node name. shapes: sizes of the axes h, g, d, e of a site afterwards, by its name.
    rows: (heads, channels) of a position in the cache of a site afterwards, by its name and side ("k", "v").
    needs: "nothing", "calibration", or "tuning": a few steps of training, for which its pass has `tune`.
    tie: candidates of different groups with the same tie (not "") are taken all or none.
    options: what `apply` needs, as plain data (numbers, strings, lists): a plan file holds it.
    arrays: what it needs beside that of the size of weights, by node name, for passes that compute it (`Computes`): empty when it is
    proposed. A plan holds it as long as the process lasts, its file does not: it is computed again from the data, or read from the model.
    """

    pass_name: str
    exact: bool
    description: str
    source: str = ""
    nodes: tuple[Node, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""
    changes: tuple[Change, ...] = ()
    removes: tuple[Node, ...] = ()
    storage: Mapping[str, str] = field(default_factory=dict)
    cached: Mapping[str, str] = field(default_factory=dict)
    scales: tuple[Node, ...] = ()
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    shapes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    needs: Needs = "nothing"
    tie: str = ""
    arrays: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def touches(self) -> frozenset[str]:
        """Names of the nodes that it changes or removes: two candidates that touch one node are not taken together."""
        return frozenset(n.name for n in (*self.nodes, *self.removes))

    def disturbs(self, other: Candidate) -> bool:
        """Whether it scales a layer that another pass changes by numbers made from its weight as it was."""
        return self.pass_name != other.pass_name and not other.touches.isdisjoint(n.name for n in self.scales)


class Evidence(Protocol):
    """What calibration saw, as far as passes read it. A pass that needs what is not there refuses."""

    @property
    def samples(self) -> int:
        """How many there are; 0 without data."""
        ...

    def linear(self, node: Node) -> Any:
        """Statistics of what a linear layer reads; None where it was not tapped."""
        ...

    def sees(self, node: Node) -> bool:
        """Whether there are data, and what this linear layer reads can be tapped. Nothing is run."""
        ...

    def second_moment(self, node: Node) -> Tensor | None:
        """X'X / rows [in, in] of what a linear layer reads; None where it was not tapped. Ask in the order of the graph."""
        ...

    def concentrated_moments(self, layers: Sequence[tuple[Site, Sequence[Node]]], least: float) -> Iterator[dict[str, Tensor]]:
        """For each attention and the linear nodes around it their second moments, tokens counted by the attention they receive."""
        ...

    def attention(self, site: Site) -> Any:
        """Statistics of an attention; None where it was not tapped."""
        ...

    def on(self, host: Host) -> Evidence:
        """The same data on a copy of the host whose weights were changed since."""
        ...

    def longest(self, site: Site) -> int:
        """The most keys that an attention has on any calibration sequence."""
        ...

    def left_out(self, site: Site, name: str, forms: Callable[[Site], Sequence[AttentionSpec]]) -> Sequence[Any] | None:
        """What each sparser form of an attention would leave out; None where it was not tapped, or has no forms."""
        ...

    def hold(self, values: Sequence[Value]) -> Iterator[tuple[Mapping[str, Tensor], list[Tensor]]]:
        """Each batch of inputs with what these values of the host hold on it."""
        ...


class Pass(Protocol):
    """A rewrite. Frozen, without state between calls; its docstring's first line says what it does."""

    @property
    def name(self) -> str: ...

    @property
    def exact(self) -> bool: ...

    @property
    def per(self) -> Per: ...

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        """Candidates, the least change first; or why there are none. Without calibration there is no evidence."""
        ...

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """The group with changed sites, or with its host edited in place: the planner gives a copy and calls `finish`.

        Nodes of the candidate may be of an equal host: find them by name.
        """
        ...


@runtime_checkable
class Tunes(Protocol):
    """A pass of which some candidates need tuning. It is asked where the user wants that and there are calibration data."""

    def tune(self, candidate: Candidate, group: Group, evidence: Evidence) -> Candidate | Refusal:
        """The candidate with what a few steps found in its options, from which alone `apply` works; or why nothing was found.

        Deterministic: random numbers come from torch's generator, which is seeded before. Neither group nor host is changed.
        """
        ...


@runtime_checkable
class Computes(Protocol):
    """A pass whose candidates need arrays of the size of weights. They are no part of what it proposes: that stays cheap."""

    def arrays(self, candidate: Candidate, group: Group, evidence: Evidence) -> Mapping[str, Mapping[str, Tensor]] | Refusal:
        """What `apply` finds in the candidate's `arrays`, by node name; or why there is none.

        Asked for when the candidate is first applied, and again where that was forgotten: the same data give the same numbers.
        """
        ...
