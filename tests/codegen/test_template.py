"""The parts of a template as one text that stands alone."""

from __future__ import annotations

import ast

from attnopt.codegen.template import Renamed, joined
from attnopt.codegen.triton.prefill import IMPORTS, PARTS


def test_parts_become_one_file():
    text = joined("attnopt.codegen.triton", PARTS, IMPORTS)
    tree = ast.parse(text)
    assert text.startswith(
        "import torch\nimport triton\nimport triton.language as tl\nfrom triton.tools.tensor_descriptor import"
    )
    assert "attnopt" not in text
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert len(functions) == len(set(functions))
    assert functions.index("mask_mod") < functions.index("prefill") < functions.index("launch") < functions.index("attention")


def test_a_part_stands_twice_under_other_names():
    text = joined("attnopt.codegen.tvm", (Renamed("decode_side", (("SIDE_", "K_"), ("side_", "key_"))), "decode_lanes"))
    names = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert {"key_code", "key_number", "vector"} <= names
    assert "K_STEPS" in text and "SIDE" not in text
