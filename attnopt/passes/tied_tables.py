"""Tables that are tied to a linear layer, as the embedding of a language model to its head: which look-ups can read the layer's codes.

    y = E[ids];  z = x E'     ->     y = ((codes - zeros) * steps)[ids];  z = x ((codes - zeros) * steps)'       E itself is gone

Rows of the table have to be outputs of the layer, and nothing else may read it: its float form would stay in the file beside the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from attnopt.ir.graph import Node
from attnopt.ir.site import Host, Refusal
from attnopt.passes.candidate import Candidate
from attnopt.rounding.rounded_weight import RoundedWeight


def tied_lookups(layer: Node, layers: Collection[Node]) -> tuple[Node, ...] | Refusal:
    """The look-ups in the weight of a layer; none where nothing looks rows up in it, and why they cannot read its codes where something
    does. layers: those whose weights are kept in codes with it.
    """
    weight = layer.inputs[1]
    others = [] if weight is None else [user for user in dict.fromkeys(weight.users) if user is not layer]
    lookups = tuple(user for user in others if user.op == "gather" and user.inputs[0] is weight)
    if not lookups:
        return ()
    if layer.op != "linear" or any(user.attrs["axis"] != 0 for user in lookups):
        return Refusal("what is looked up in it are no rows that the layer makes outputs of", lookups[0])
    if len([n for n in layers if n.inputs[1] is weight]) > 1:
        return Refusal("several layers hold the table, each in codes of its own", lookups[0])
    rest = next((user for user in others if user not in lookups), None)
    return lookups if rest is None else Refusal(f"{rest.op} reads the table too", rest)


def tied(
    layers: Collection[Node], refuses: Callable[[Node, Node], Refusal | None] = lambda layer, lookup: None
) -> tuple[dict[Node, Node], str]:
    """({look-up: the one of these layers whose codes it reads}, what a description says of it). refuses: (layer, look-up) -> why not."""
    found, why = dict[Node, Node](), ""
    for layer in layers:
        lookups = tied_lookups(layer, layers)
        refused = lookups if isinstance(lookups, Refusal) else next((r for n in lookups if (r := refuses(layer, n))), None)
        if isinstance(refused, Refusal):
            why = f", but the tied table stays in float: {refused.reason}"
        elif not isinstance(lookups, Refusal):
            found |= dict.fromkeys(lookups, layer)
    return found, ", and the tied table is read from the codes" * bool(found) + why


def with_lookups(weights: Mapping[str, RoundedWeight], candidate: Candidate, host: Host) -> dict[str, RoundedWeight]:
    """Rounded weights of the layers of a candidate, by name, and of its look-ups those of the layers that hold the table."""
    wanted = candidate.touches
    by_table = {n.inputs[1]: weights[n.name] for n in host.graph.of("linear") if n.name in weights}
    lookups = [n for n in host.graph.of("gather") if n.name in wanted and n.inputs[0] in by_table]
    return {**weights, **{n.name: by_table[n.inputs[0]] for n in lookups}}
