"""The parts of a template as one text that stands alone."""

from __future__ import annotations

import ast

from attnopt.codegen.triton.template import PREFILL, joined


def test_parts_become_one_file():
    text = joined(PREFILL)
    tree = ast.parse(text)
    assert text.startswith("import torch\nimport triton\nimport triton.language as tl\nfrom triton.tools.tensor_descriptor import")
    assert "attnopt" not in text
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert len(functions) == len(set(functions))
    assert functions.index("mask_mod") < functions.index("prefill") < functions.index("launch") < functions.index("attention")
