"""What each tile of the tables takes on this GPU, beside what the cost model says: what `codegen/triton/measured_tiles.toml` holds.

    causal prefill, d128, bf16 on sm_90      128 x 128, 8 warps, 2 stages = 1.0      64 x 64, 4 warps, 3 stages = 1.31

Every tile that the compiler makes as meant runs on the same data, in turn. A factor is measured over predicted seconds, the best of
its table as 1: it is what the cost model cannot know of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from attnopt.codegen.emitted import load
from attnopt.codegen.triton import compile as prefill_compile
from attnopt.codegen.triton import decode as decode_family
from attnopt.codegen.triton import decode_compile
from attnopt.codegen.triton import prefill as prefill_family
from attnopt.codegen.triton.compile import Compiled
from attnopt.codegen.triton.configurations import configurations
from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.triton.decode_tiles import decode_tiles
from attnopt.codegen.triton.prefill import Form
from attnopt.codegen.triton.ranking import SHAPES, Question, predicted, target_of, written
from attnopt.codegen.triton.tiles import Tile
from attnopt.ir.spec import parse
from gpu.clock import in_turn

HEADER = """# What tiles took over what the cost model predicted for them, the best of a table as 1; written by
# `python benchmarks/gpu_attention.py --tiles`.
"""
LINES = {"prefill": "softmax scale(0.125) causal", "decode": "softmax scale(0.125)"}
WIDTHS = (64, 128, 256)


def questions(architecture: str) -> Iterator[Question]:
    for family, line in LINES.items():
        for width in WIDTHS:
            yield Question(family, parse(line), width, width, "bfloat16", architecture)


def tried(question: Question) -> tuple[Tile, ...]:
    width = question.width
    if question.family == "prefill":
        return configurations(question.spec, Form(width, width, question.dtype), question.architecture)
    return decode_tiles(question.architecture, question.spec, decode_form(question))


def decode_form(question: Question) -> DecodeForm:
    return DecodeForm(question.width, question.width, question.dtype, lengths=False)


def fits(question: Question, tile: Tile) -> bool:
    if question.family == "prefill":
        made = prefill_compile.compile_for(
            question.spec, Form(question.width, question.width, question.dtype), question.architecture, tile
        )
    else:
        made = decode_compile.compile_for(question.spec, decode_form(question), question.architecture, tile)
    return isinstance(made, Compiled) and made.refusal() is None


def source(question: Question, tile: Tile) -> str:
    if question.family == "prefill":
        return prefill_family.emit(question.spec, Form(question.width, question.width, question.dtype), tile)
    return decode_family.emit(question.spec, decode_form(question), tile)


def measured(question: Question, tiles: Sequence[Tile], device: torch.device, *, shrink: int = 1) -> dict[str, float]:
    """The factor of each tile by its name. shrink: lengths are divided by it."""
    shape = SHAPES[question.family]
    q_len, kv_len = (max(1, shape[axis] // shrink) for axis in "qk")
    dtype = getattr(torch, question.dtype)
    q = torch.randn(shape["b"], shape["h"], q_len, question.width, dtype=dtype, device=device)
    k, v = (torch.randn(shape["b"], shape["g"], kv_len, question.width, dtype=dtype, device=device) for _ in range(2))

    def call(tile: Tile) -> Callable[[], object]:
        attention = load(source(question, tile)).attention
        return lambda: attention(q, k, v)

    calls = {written(tile): call(tile) for tile in tiles}
    for each in calls.values():
        each()  # Triton compiles
    spent = in_turn(calls)
    target = target_of(question.architecture)
    expected = {written(tile): predicted(tile, question, target) if target else 1.0 for tile in tiles}
    ratios = {name: spent[name] / expected[name] for name in spent}
    best = min(ratios.values())
    return {name: round(ratio / best, 4) for name, ratio in sorted(ratios.items(), key=lambda found: found[1])}


def as_toml(found: dict[str, dict[str, float]]) -> str:
    tables = [
        f'["{name}"]\n' + "".join(f'"{tile}" = {factor}\n' for tile, factor in factors.items()) for name, factors in found.items()
    ]
    return "\n".join([HEADER, *tables])


def all_tiles(architecture: str, device: torch.device) -> Iterator[tuple[str, dict[str, float]]]:
    """Table by table: its name, and the factors of its tiles."""
    for question in questions(architecture):
        tiles = [tile for tile in tried(question) if fits(question, tile)]
        if tiles:
            yield question.measured_as, measured(question, tiles, device)
