"""What passes that round weights share: the layers that a format fits, candidates, and the rounding applied.

    layers of a group, "int4 group 32"   ->   those that can be held so, and why the others cannot          candidate   ->   host

Groups are the widest that divide a layer's rows, so that layers of different widths take part in one wish for "at most 128".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnopt.errors import PlanError
from attnopt.ir.graph import Node
from attnopt.ir.site import Host, Refusal
from attnopt.passes.candidate import Candidate, Group, Needs
from attnopt.passes.edits.layers.linear_layers import matrix, suits
from attnopt.passes.tied_tables import tied
from attnopt.rounding.rounded_weight import RoundedWeight, unfit
from attnopt.rounding.weight_format import WeightFormat, nearest_divisor

GROUPS = (128, 64, 32, 16)


@dataclass(frozen=True)
class Wish:
    """bits, the most inputs that share a step (0: all of a row), and whether zero points are kept: a format for layers of any width."""

    bits: int
    most: int
    zeros: bool = False

    def format(self, inputs: int) -> WeightFormat | None:
        """The format for rows of so many inputs; None where no group up to the most divides them."""
        if not self.most:
            return WeightFormat(self.bits, 0, self.zeros)
        group = next((g for g in GROUPS if g <= self.most and inputs % g == 0), None)
        return None if group is None else WeightFormat(self.bits, group, self.zeros)

    def refusal(self, inputs: int, what: str, at: Node) -> Refusal:
        """Why there is no format for rows of so many inputs, with the nearest that divides them."""
        near = nearest_divisor(inputs, self.most)
        said = f"no group of {GROUPS[-1]} to {self.most} divides rows of {inputs} {what}; {near} do"
        return Refusal(said, at, remedy="one step for each row: groups of 0")


def formats(group: Group, wish: Wish, smallest: int) -> dict[Node, WeightFormat] | Refusal:
    """The layers of a group that can be held so, with the format of each; why none can where that is so."""
    found: dict[Node, WeightFormat] = {}
    refusal = Refusal(f"no linear layer with constant weights of at least {smallest} x {smallest}", group.name)
    for node in group.linears:
        if not suits(node, smallest):
            continue
        weight = matrix(node)
        format = wish.format(weight.shape[1])
        if format is None:
            refusal = wish.refusal(weight.shape[1], "inputs", node)
        elif (why := unfit(weight, format, node.name) or group.host.refuses_rounded(node, format)) is not None:
            refusal = why
        else:
            found[node] = format
    return found or refusal


def candidate(
    name: str,
    source: str,
    method: str,
    kept: Mapping[Node, WeightFormat],
    *,
    options: Mapping[str, Any] | None = None,
    needs: Needs = "nothing",
    host: Host | None = None,
) -> Candidate:
    """These layers in their formats, which stand in the options.

    host: where codes stand for the weights as they are, and a table that is tied to a layer can be read from them (`with_lookups`).
    """
    tables, tie = ({}, "") if host is None else tied(kept, lambda layer, n: host.refuses_rounded(n, kept[layer]))
    said = " and ".join(dict.fromkeys(str(f) for f in kept.values()))
    layers = "the linear layer" if len(kept) == 1 else f"the {len(kept)} linear layers"
    named = {n.name: str(f) for n, f in kept.items()}
    return Candidate(
        name,
        False,
        f"weights of {layers} as {said}, {method}{tie}",
        source,
        (*kept, *tables),
        {"formats": named, **(options or {})},
        said,
        changes=("weights",),
        storage={**named, **{n.name: str(kept[layer]) for n, layer in tables.items()}},
        needs=needs,
    )


def nodes_of(candidate: Candidate, host: Host) -> list[Node]:
    """The layers of a candidate in this host. Raises PlanError where it has not all of them."""
    wanted = candidate.options["formats"]
    found = [n for n in host.graph.of("linear", "matmul") if n.name in wanted]
    if missing := wanted.keys() - {n.name for n in found}:
        raise PlanError(
            f"the model has no layer '{min(missing)}', which '{candidate.pass_name}' rounds",
            next_move="The plan is of another model: search again.",
        )
    return found


def formats_of(candidate: Candidate, host: Host) -> dict[Node, WeightFormat]:
    """The layers of a candidate in this host, with the format of each. Raises PlanError where it has not all of them."""
    found = {n: WeightFormat.read(candidate.options["formats"][n.name]) for n in nodes_of(candidate, host)}
    return {node: format for node, format in found.items() if format is not None}


def kept_codes(candidate: Candidate, nodes: Sequence[Node]) -> dict[str, RoundedWeight]:
    """The rounded weights that a candidate brings along, by node name. Raises PlanError where it does not."""
    made = {}
    for node in nodes:
        arrays = candidate.arrays.get(node.name)
        if arrays is None:
            raise PlanError(
                f"the plan does not hold the codes that '{candidate.pass_name}' found for '{node.name}'",
                where=node.name,
                next_move="Give the calibration data that it was found with, or as the plan the file that was written with it.",
            )
        format = WeightFormat.read(candidate.options["formats"][node.name])
        assert format is not None
        made[node.name] = RoundedWeight.from_arrays(format, dict(arrays), matrix(node).shape[1])
    return made
