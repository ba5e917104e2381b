"""Tables that are tied to a linear layer, as the embedding of a language model to its head: which look-ups can read the layer's codes.

    y = E[ids];  z = x E'     ->     y = ((codes - zeros) * steps)[ids];  z = x ((codes - zeros) * steps)'       E itself is gone

Rows of the table have to be outputs of the layer, and nothing else may read it: its float form would stay in the file beside the codes.
"""

from __future__ import annotations

from collections.abc import Collection

from attnopt.ir.graph import Node
from attnopt.ir.site import Refusal


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


def tied(layers: Collection[Node]) -> tuple[tuple[Node, ...], str]:
    """(the look-ups that read the codes of these layers, what a description says of it)."""
    found = [tied_lookups(layer, layers) for layer in layers]
    nodes = tuple(n for some in found if not isinstance(some, Refusal) for n in some)
    said = ", and the tied table is read from the codes" if nodes else ""
    why = next((f", but the tied table stays in float: {x.reason}" for x in found if isinstance(x, Refusal)), "")
    return nodes, said + why
