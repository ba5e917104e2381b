"""One text of the files of a family: a template is written in parts that import from one another, and emitted as one file.

prefill_holes.py + prefill_blocks.py + … + prefill_launch.py   ->   imports of torch and triton, then all constants and functions
"""

from __future__ import annotations

import ast
import functools
from importlib import resources


@functools.cache
def joined(package: str, parts: tuple[str, ...], first: tuple[str, ...] = ()) -> str:
    """The parts in this order, without docstrings of files and without imports from one another.

    package: whose folder `kernels` holds the parts. first: imports that stand before those of the parts.
    """
    imports: dict[str, None] = dict.fromkeys(first)
    bodies = []
    for part in parts:
        text = (resources.files(package) / "kernels" / f"{part}.py").read_text(encoding="utf-8")
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
