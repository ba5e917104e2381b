"""One text of the files of a family: a template is written in parts that import from one another, and emitted as one file.

prefill_holes.py + prefill_blocks.py + … + prefill_launch.py   ->   imports of torch and triton, then all constants and functions
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Renamed:
    """A part that stands in the text under other names: SIDE_… as K_… and once more as V_…; names: what is replaced, by what."""

    part: str
    names: tuple[tuple[str, str], ...]


@functools.cache
def joined(package: str, parts: tuple[str | Renamed, ...], first: tuple[str, ...] = ()) -> str:
    """The parts in this order, without docstrings of files and without imports from one another.

    package: whose folder `kernels` holds the parts. first: imports that stand before those of the parts.
    """
    imports: dict[str, None] = dict.fromkeys(first)
    bodies = []
    for part in parts:
        name, names = (part.part, part.names) if isinstance(part, Renamed) else (part, ())
        text = (resources.files(package) / "kernels" / f"{name}.py").read_text(encoding="utf-8")
        for old, new in names:
            text = text.replace(old, new)
        start = 0
        for node in ast.parse(text).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("attnopt.")):
                    imports[ast.unparse(node)] = None
            elif not isinstance(node, ast.Expr):
                break
            start = node.end_lineno or start
        bodies.append("".join(text.splitlines(keepends=True)[start:]).strip("\n"))
    return "\n".join(imports) + "\n\n" + "\n\n\n".join(bodies) + "\n"
