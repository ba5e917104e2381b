"""Which rows are real, by the documented rule; what no mask fits counts whole."""

from __future__ import annotations

import pytest
import torch

from attnopt.analysis.padding import Padding, is_longer, real
from attnopt.ir.dims import product, symbol
from attnopt.ir.graph import Graph, Value

B, L, T = symbol("batch"), symbol("length"), symbol("target")
MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])


def padding(**shapes):
    return Padding.of(Graph(inputs=[Value(name, shape, "int64") for name, shape in shapes.items()]))


def rows(found, shape, inputs, sizes):
    return found.leading(shape, torch.zeros(sizes), inputs)


def test_rows_of_the_same_length():
    found, inputs = padding(input_ids=(B, L), attention_mask=(B, L)), {"attention_mask": MASK}
    assert torch.equal(rows(found, (B, L, 8), inputs, (2, 4, 8)), MASK.bool())
    assert torch.equal(rows(found, (B, L, 2, 4), inputs, (2, 4, 2, 4)), MASK.bool())
    assert torch.equal(rows(found, (product((B, L)), 8), inputs, (8, 8)), MASK.bool().flatten())
    for shape, sizes in (((B, T, 8), (2, 4, 8)), ((B, 8), (2, 8)), (None, (2, 4, 8)), ((B,), (2,))):
        assert rows(found, shape, inputs, sizes) is None


def test_names_that_an_exporter_gave_each_input():
    """input_ids [s0, s1] and attention_mask [s2, s3]: what is as long as input_ids is masked too."""
    other = symbol("s1")
    found, inputs = padding(input_ids=(symbol("s0"), other), attention_mask=(symbol("s2"), L)), {"attention_mask": MASK}
    assert torch.equal(rows(found, (symbol("s0"), other, 8), inputs, (2, 4, 8)), MASK.bool())
    assert torch.equal(rows(found, (product((symbol("s0"), other)), 8), inputs, (8, 8)), MASK.bool().flatten())


def test_masks_of_two_sides():
    """The lengths of an encoder and a decoder may be equal numbers; their names tell which mask is whose."""
    shapes = {
        "input_ids": (B, L),
        "attention_mask": (B, L),
        "decoder_input_ids": (B, T),
        "decoder_attention_mask": (B, symbol("t")),
    }
    inputs = {"attention_mask": MASK, "decoder_attention_mask": 1 - MASK}
    found = padding(**shapes)
    assert torch.equal(rows(found, (B, L, 8), inputs, (2, 4, 8)), MASK.bool())
    assert torch.equal(rows(found, (B, T, 8), inputs, (2, 4, 8)), ~MASK.bool())
    alone = padding(**{name: shape for name, shape in shapes.items() if name != "decoder_attention_mask"})
    assert rows(alone, (B, T, 8), inputs, (2, 4, 8)) is None
    twice = padding(attention_mask=(B, L), decoder_attention_mask=(B, L))
    assert rows(twice, (B, L, 8), inputs, (2, 4, 8)) is None


def test_a_mask_over_the_past():
    whole = symbol("past + length")
    found, inputs = padding(input_ids=(B, L), attention_mask=(B, whole)), {"attention_mask": MASK}
    assert torch.equal(rows(found, (B, L, 8), inputs, (2, 2, 8)), MASK[:, 2:].bool())
    assert torch.equal(rows(found, (B, whole, 8), inputs, (2, 4, 8)), MASK.bool())


@pytest.mark.parametrize(
    ("whole", "longer"), [("past + length", True), ("length", False), ("length - 1", False), ("other", False)]
)
def test_longer(whole, longer):
    assert is_longer(symbol(whole), L) is longer


@pytest.mark.parametrize(
    ("name", "mask"), [("attention_mask", MASK * 2), ("attention_mask", MASK - 1.0), ("key_padding_mask", MASK), ("seen", MASK)]
)
def test_what_is_no_such_mask(name, mask):
    assert rows(padding(**{name: (B, L)}), (B, L, 8), {name: mask}, (2, 4, 8)) is None


def test_real_rows_are_taken():
    x = torch.arange(16.0).reshape(2, 4, 2)
    assert real(x, MASK.bool())[:, 0].tolist() == [0.0, 2.0, 4.0, 10.0, 12.0, 14.0]
    assert real(x, None).shape == (8, 2)
    assert real(x[:, :, None].expand(-1, -1, 3, -1), MASK.bool()).shape == (18, 2)
    assert real(x.reshape(8, 2), MASK.bool().flatten()).shape == (6, 2)
