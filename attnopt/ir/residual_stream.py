"""The residual stream of a model: what writes into it, and which norms read it for which linear layers.

    embedding -> + o_proj(attention(norm(x))) -> + down_proj(mlp(norm(x))) -> … -> norm -> head

An orthogonal matrix can be moved through all of it where every reader is a norm by root mean square: its length is all that such a norm
asks of a row, and length does not change. A norm that takes the mean off first asks for more: where one reads, nothing is rotated.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.block import Norm
from attnopt.ir.graph import Node, Value
from attnopt.ir.site import Refusal


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of a constant [rows, width] that are looked up: the node, and the value that it reads."""

    node: Node
    value: Value


@dataclass(frozen=True, eq=False)
class Writer:
    """A linear layer whose output is added to the stream. bias: the constant that is added to it, and the node that reads it."""

    node: Node
    bias: tuple[Node, Value] | None = None


@dataclass(frozen=True, eq=False)
class Reader:
    """A norm of the stream, and all the linear layers that read it; nothing else does. gain: the node that reads the norm's weight."""

    norm: Norm
    layers: tuple[Node, ...]
    gain: Node | None = None


@dataclass(frozen=True, eq=False)
class ResidualStream:
    """One stream of `width` channels, whole: whatever touches it is listed."""

    width: int
    tables: tuple[Table, ...]
    writers: tuple[Writer, ...]
    readers: tuple[Reader, ...]

    def refuses_rotation(self) -> Refusal | None:
        """Why no orthogonal matrix can be moved through; None where one can."""
        found = next((r.norm for r in self.readers if r.norm.kind != "rms"), None)
        if found is None:
            return None
        why = f"a {found.kind} norm reads the residual stream: a rotation passes through rms norms only"
        return Refusal(why, found.output.producer)
