"""What docs/kvcache.md shows runs, and its table names the policies that there are."""

from __future__ import annotations

import re
from pathlib import Path

import hf_models
import torch

from attnopt.passes.kvcache.eviction import POLICIES

PAGE = (Path(__file__).parents[1] / "docs" / "kvcache.md").read_text(encoding="utf-8")


def test_the_code_of_the_page(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    random = torch.Generator().manual_seed(0)
    ids, texts = (torch.randint(2, hf_models.VOCABULARY, shape, generator=random) for shape in ((1, 40), (4, 24)))
    exec(code, {"model": hf_models.build("llama", "sdpa"), "ids": ids, "texts": texts})
    said = capsys.readouterr().out
    assert re.search(r"layer 1: \d+ of 47 tokens: softmax heads\(4, 2\) .* by=snap", said)
    assert " * " in said


def test_the_table_of_the_page():
    assert re.findall(r"^\| `([a-z-]+)` \|", PAGE, re.MULTILINE) == [kind().name for kind in POLICIES]
