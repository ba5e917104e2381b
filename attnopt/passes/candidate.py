"""What a pass returns: candidates. A pass proposes, the planner decides.

    propose(group, evidence) -> candidates          apply(candidate, group) -> group

A `Group` is the sites that must agree (or the linear layers of a model). A candidate says what it would change, whether that
is exact, and where it comes from; applying it changes the spec of sites or the weights of a host, never the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from attnopt.ir.graph import Node
from attnopt.ir.site import Host, Refusal, Site


@dataclass(frozen=True)
class Group:
    """Sites that are rewritten together, in the host that they live in."""

    host: Host
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Candidate:
    """One possible rewrite of a group. `nodes` are the canonical nodes whose weights it changes, if any."""

    pass_name: str
    exact: bool
    description: str
    source: str = ""
    nodes: tuple[Node, ...] = ()
    options: dict[str, object] = field(default_factory=dict)


class Pass(Protocol):
    """A rewrite. Frozen, without state between calls; its docstring's first line says what it does."""

    @property
    def name(self) -> str: ...

    @property
    def exact(self) -> bool: ...

    def propose(self, group: Group) -> list[Candidate] | Refusal: ...

    def apply(self, candidate: Candidate, group: Group) -> Group: ...
