"""What selectors choose from pooled rows is what the reference chooses from all scores."""

from __future__ import annotations

import pytest
import torch
from ir.operands import close

from attnopt.ir.reference import reference, rows_of
from attnopt.ir.selections import SELECTIONS
from attnopt.ir.spec import parse
from attnopt.selectors.select import refusal, select
from attnopt.selectors.shown import shown_tiles, unsettled


def qkv(q_len=70, kv_len=70, heads=4, key_heads=2, width=8, seed=0):
    made = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, q_len, width), (2, key_heads, kv_len, width), (2, key_heads, kv_len, width))
    # Rows that drift: blocks are alike, more or less.
    return tuple(torch.randn(s, generator=made, dtype=torch.float64).cumsum(2) / 3 for s in shapes)


def wanted(spec, q, k, v, **operands):
    """The pairs that the reference selects and the mask shows."""
    rows = rows_of(spec.with_(selection=None), q, k, v, operands)
    shown = rows.visible
    return shown if spec.selection is None else shown & SELECTIONS[spec.selection.name](rows, spec.selection).visible, shown


LINES = [
    "pooled_blocks(16, 8, mass=0.7, similarity=-1.0)",
    "pooled_blocks(16, 8, mass=0.9, similarity=0.5)",
    "pooled_blocks(16, 8, share=0.3, similarity=0.5, first=2)",
    "block_topk(8, 3)",
    "block_topk(16, 2, first=1, recent=2)",
    "block_topk(16, 3, rows=8)",
    "block_topk(16, 3, rows=8, probe=activation)",
    "block_topk(8, 4, rows=12, first=1)",
]


@pytest.mark.parametrize(
    ("mask", "line"),
    [(mask, line) for line in LINES for mask in ("", " causal")] + [(" causal & window(45)", line) for line in LINES],
)
def test_the_choice_is_that_of_the_reference(line, mask):
    q, k, v = qkv()
    spec = parse(f"softmax scale(0.3){mask} {line}")
    assert refusal(spec) is None
    found, shown = wanted(spec, q, k, v)
    chosen = select(spec, q, k, {}).elements(70, 70) & shown
    assert torch.equal(chosen, found)
    assert 0.2 < float(found.sum() / shown.sum()) < 0.99  # it leaves something out, and keeps something


@pytest.mark.parametrize(
    "mask",
    [
        "causal & window(20)",
        "causal & (window(20) | global(3))",
        "window(9) & lookahead(12)",
        "chunk(12) & causal",
        "near_blocks(12, 1) & last(40)",
        "dilated(3) & causal",
        "causal & (near_blocks(16, 0) | power_blocks(16) | global(16))",
        "causal & (near_blocks(16, 0) | causal_random_blocks(16, 0, 2, 5) | global(16))",
        "near_blocks(32, 0) | random_blocks(32, 0, 1, 5) & padding",
        "causal & (window(9) | global(3) | window(40) & (h == 1 | h == 2) | h == 3)",
        "causal & (window(9) | dilated(5)) & (global(16) | padding & q >= 20)",
        "causal & padding",
        "window(4) & lookahead(4) | global(30)",
    ],
)
@pytest.mark.parametrize("lengths", [(70, 70), (21, 70)])
def test_tiles_that_the_mask_shows(mask, lengths):
    q, k, v = qkv(*lengths)
    spec = parse(f"softmax {'offset(size(k) - size(q)) ' if lengths[0] < lengths[1] else ''}{mask}")
    padding = torch.arange(70) < torch.tensor([70, 33])[:, None]
    _, shown = wanted(spec, q, k, v, padding=padding)
    tiles = shown_tiles(spec, q, k, {"padding": padding}, 16, 8)
    blocked = torch.stack([part.any(-1) for part in shown.split(8, -1)], -1)
    blocked = torch.stack([part.any(-2) for part in blocked.split(16, -2)], -2)
    assert torch.equal(tiles.expand_as(blocked), blocked)


@pytest.mark.parametrize("padded", [70, 33])
def test_data_that_hide_nothing_are_not_looked_at(padded):
    q, k, _ = qkv()
    given = {"padding": torch.arange(70) < torch.tensor([70, padded])[:, None], "document": torch.full((2, 70), 3)}
    spec = parse("softmax causal & padding & document")
    assert str(unsettled(spec, q, k, given)) == ("causal" if padded == 70 else "causal & padding")
    apart = {**given, "document": torch.arange(70).expand(2, -1) // 30}
    assert "document" in str(unsettled(spec, q, k, apart))


def test_the_list_holds_the_chosen_blocks_in_order():
    q, k, _ = qkv()
    tiles = select(parse("softmax scale(0.3) causal block_topk(16, 3, rows=8)"), q, k, {}).tiles
    counts, blocks = tiles.listed()
    for at in ((0, 0, 8), (1, 3, 5), (0, 2, 0)):
        listed = blocks[at][: int(counts[at])].tolist()
        assert listed == tiles.chosen[at].nonzero().flatten().tolist()
    assert blocks.dtype == counts.dtype == torch.int32


def test_given_tiles_are_those_the_mask_shows():
    q, k, v = qkv()
    tiles = torch.rand(1, 4, 5, 9) < 0.6
    spec = parse("softmax scale(0.3) causal blocks(16, 8, operand=t)")
    choice = select(spec, q, k, {"t": tiles})
    found, shown = wanted(spec, q, k, v, t=tiles)
    assert torch.equal(choice.elements(70, 70) & shown, found)
    assert not choice.tiles.chosen[:, :, 0, 2:].any()


@pytest.mark.parametrize("line", LINES)
def test_keeping_everything_is_dense(line):
    q, k, v = qkv()
    line = line.replace("mass=0.7", "mass=2.0").replace("mass=0.9", "mass=2.0").replace("share=0.3", "share=1.0")
    line = line.replace("(8, 3", "(8, 9").replace("(16, 2", "(16, 9").replace("(16, 3", "(16, 9").replace("(8, 4", "(8, 9")
    spec = parse(f"softmax scale(0.3) causal {line}")
    seen = select(spec, q, k, {}).elements(70, 70)
    assert bool((seen | ~torch.ones(70, 70, dtype=torch.bool).tril()).all())
    close(reference(spec, q, k, v), reference(spec.with_(selection=None), q, k, v))


def test_refusals():
    for line, why in (
        ("softmax top_keys(4)", "chooses single keys"),
        ("softmax scale(0.1) softcap(30.0) pooled_blocks(64, 64)", "not for 'scale(0.1) softcap(30.0)'"),
        ("softmax rotary(8) pooled_blocks(64, 64)", "position changes queries and keys"),
    ):
        found = refusal(parse(line))
        assert found is not None and why in found.reason
