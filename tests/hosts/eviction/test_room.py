"""Rows are written behind those that are held, never over them, and empty places count."""

from __future__ import annotations

import copy

import pytest
import torch

from attnopt.errors import InputMismatch
from attnopt.hosts.eviction.stored import Stored, storage

FORMS = ["int8", "cache(k=int4, v=int4, group=8, scales=fp16)", "cache(k=fp8, v=fp16)", None]


def rows(count, batch=2):
    return torch.randn(batch, 3, count, 16, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("words", FORMS)
@pytest.mark.parametrize("side", ["k", "v"])
def test_tokens_one_by_one_are_those_at_once(words, side):
    clause, x = storage(words), rows(9)
    one = Stored(clause, side).grown(x[:, :, :5])
    for at in range(5, 9):
        one = one.grown(x[:, :, at : at + 1], spare=2)
    assert torch.equal(one.read(), Stored(clause, side).grown(x).read()) and one.length == 9


def test_a_token_moves_nothing_while_there_are_places_and_they_count():
    clause, x = storage("int8"), rows(8)
    exact = Stored(clause, "k").grown(x[:, :, :4])
    assert exact.bytes == 2 * 3 * 4 * (16 + 8)
    roomy = exact.grown(x[:, :, 4:5], spare=3)
    assert roomy.bytes == 2 * 3 * 8 * (16 + 8)
    place = roomy.packed.codes.data_ptr()
    later = roomy.grown(x[:, :, 5:8], spare=3)
    assert (later.packed.codes.data_ptr(), later.bytes) == (place, roomy.bytes)
    assert later.grown(x[:, :, :1]).packed.codes.data_ptr() != place


def test_who_grows_another_way_leaves_the_others_as_they_were():
    x = rows(8)
    start = Stored(storage("int8"), "k").grown(x[:, :, :4]).grown(x[:, :, 4:5], spare=8)
    first, twin = start.grown(x[:, :, 5:6]), copy.deepcopy(start)
    held = first.read()
    others = [start.grown(x[:, :, 6:7]), twin.grown(x[:, :, 6:7])]
    cut = first.mapped(lambda y: y[:, :, :4]).grown(x[:, :, 7:8], spare=8)
    assert torch.equal(first.read(), held) and all(torch.equal(other.read(), others[0].read()) for other in others)
    assert torch.equal(cut.read()[:, :, :4], held[:, :, :4]) and not torch.equal(cut.read()[:, :, 4], held[:, :, 4])


def test_other_sequences_and_numbers_without_a_code_are_errors():
    held = Stored(storage("int8"), "k").grown(rows(4))
    with pytest.raises(InputMismatch, match=r"\[2, 3\] sequences and heads cannot take tokens of \[1, 3\]"):
        held.grown(rows(1, batch=1))
    with pytest.raises(InputMismatch, match="k is nan in sequence 0, head 0, token 0, channel 0"):
        held.grown(torch.full((2, 3, 1, 16), torch.nan))


def test_a_cache_of_inference_mode_is_not_written_outside_of_it():
    with torch.inference_mode():
        held = Stored(storage("int8"), "k").grown(rows(4)).grown(rows(1), spare=4)
    later = held.grown(rows(1))
    assert torch.equal(later.read()[:, :, :5], held.read()) and later.length == 6


def test_gradients_write_nothing():
    x = rows(4).requires_grad_()
    made = Stored(storage("int8"), "k").grown(x).grown(rows(1), spare=4)
    assert torch.equal(made.read(), Stored(storage("int8"), "k").grown(torch.cat([rows(4), rows(1)], 2)).read())
