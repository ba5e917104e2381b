"""One text of the files of a family: a template is written in parts that import from one another, and emitted as one file.

prefill_holes.py + prefill_blocks.py + … + prefill_launch.py   ->   imports of torch and triton, then all constants and functions
"""

from __future__ import annotations

import ast
import functools
from importlib import resources

PREFILL = ("prefill_holes", "prefill_blocks", "prefill_norms", "prefill", "prefill_launch")


@functools.cache
def joined(parts: tuple[str, ...]) -> str:
    """The parts in this order, without docstrings of files and without imports from one another."""
    imports: dict[str, None] = {"import torch": None, "import triton": None, "import triton.language as tl": None}
    bodies = []
    for part in parts:
        text = (resources.files("attnopt.codegen.triton") / "kernels" / f"{part}.py").read_text(encoding="utf-8")
        first = 0
        for node in ast.parse(text).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("attnopt.")):
                    imports[ast.unparse(node)] = None
            elif not isinstance(node, ast.Expr):
                break
            first = node.end_lineno or first
        bodies.append("".join(text.splitlines(keepends=True)[first:]).strip("\n"))
    return "\n".join(imports) + "\n\n" + "\n\n\n".join(bodies) + "\n"
