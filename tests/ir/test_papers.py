"""The language can say what each paper computes: every line of papers.toml reads back, and runs."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path

import pytest
import torch

from attnopt.ir.cost import cost
from attnopt.ir.reference import reference
from attnopt.ir.spec import AttentionSpec, parse

TABLE = tomllib.loads((Path(__file__).parent / "papers.toml").read_text(encoding="utf-8"))
LINES = [pytest.param(title, line, id=f"{title} {i}") for title, row in TABLE.items() for i, line in enumerate(row["specs"])]
BATCH, LENGTH, HEADS, WIDTH = 2, 36, 4, 8


def sizes(spec: AttentionSpec, row: dict) -> dict[str, int]:
    """B, H, G, V (value heads), Q, K, D, E of a trial: those that the line says, small ones otherwise."""
    heads = spec.head_counts or (HEADS,) * 3
    widths = (WIDTH, WIDTH) if spec.width is None else (spec.width.count(0), spec.width.count(1))
    keys = row.get("keys", LENGTH)
    names = {"B": BATCH, "Q": row.get("queries", keys), "K": keys}
    return {**names, **dict(zip("HGV", heads, strict=True)), **dict(zip("DE", widths, strict=True))}


def operand(text: str, size: dict[str, int]) -> torch.Tensor:
    """A random tensor as the table describes it: `unit B H K`."""
    kind, *names = text.split()
    shape = [size[name] if name in size else int(name) for name in names]
    if kind == "bool":
        return torch.rand(shape) < 0.5
    if kind == "bits":
        return torch.tensor([2, 4, 16])[torch.randint(0, 3, shape)]
    if match := re.fullmatch(r"int<(\d+)", kind):
        return torch.randint(0, int(match.group(1)), shape)
    normal = torch.randn(shape, dtype=torch.float64)
    return {"normal": normal, "unit": torch.sigmoid(normal)}[kind]


@pytest.mark.parametrize(("title", "line"), LINES)
def test_the_line_reads_back(title, line):
    assert str(parse(line)) == line
    assert parse(str(parse(line))) == parse(line)


def tensors(spec: AttentionSpec, row: dict) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Random q, k, v, one tensor where the line says so, and the operands that it loads."""
    size = sizes(spec, row)
    q, k, v = (torch.randn([size[name] for name in shape], dtype=torch.float64) for shape in ("BHQD", "BGKD", "BVKE"))
    shared = "" if spec.shared is None else spec.shared.word(0)
    given = [k if "q" in shared else q, k, k[..., : size["E"]] if "v" in shared else v]
    return given, {name: operand(row["operands"][name], size) for name in spec.operands}


@pytest.mark.parametrize(("title", "line"), LINES)
def test_the_line_runs(title, line):
    spec, row = parse(line), TABLE[title]
    given, operands = tensors(spec, row)
    output = reference(spec, *given, **operands)
    assert output.shape == (*given[0].shape[:3], given[2].shape[-1])
    assert output.dtype == torch.float64
    assert output.isfinite().all()


@pytest.mark.parametrize(("title", "line"), [p for p in LINES if parse(p.values[1]).operands])
def test_every_operand_of_the_line_matters(title, line):
    spec, row = parse(line), TABLE[title]
    given, operands = tensors(spec, row)
    output = reference(spec, *given, **operands)
    for name in spec.operands:
        other = operands[name]
        while torch.equal(other, operands[name]):
            other = operand(row["operands"][name], sizes(spec, row))
        assert not torch.equal(reference(spec, *given, **{**operands, name: other}), output), name


@pytest.mark.parametrize(("title", "line"), LINES)
def test_the_line_has_a_price(title, line):
    size = sizes(parse(line), TABLE[title])
    found = cost(line, {name.lower(): size[name] for name in "BHGQKDE"})
    assert 0 < found.flops < math.inf
    assert 0 < found.bytes < math.inf


def test_every_paper_has_its_row():
    assert len(TABLE) == 119
    assert all(row["specs"] for row in TABLE.values())


@pytest.mark.parametrize("title", TABLE)
def test_a_row_says_no_more_than_its_lines(title):
    row = TABLE[title]
    assert row.keys() <= {"specs", "operands", "keys", "queries", "why"}
    assert set(row.get("operands", {})) == {name for line in row["specs"] for name in parse(line).operands}
    if "why" in row:  # a method that leaves attention alone stands beside plain attention
        assert row["specs"] in (
            ["softmax scale(0.125)"],
            ["softmax scale(0.125) causal"],
            ["softmax rotary(8) scale(0.125) causal"],
        )
