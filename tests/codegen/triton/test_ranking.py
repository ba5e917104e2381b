"""Tiles are tried in the order of the table, but where the mask or a measurement says otherwise."""

from __future__ import annotations

import pytest

from attnopt.codegen.triton import ranking
from attnopt.codegen.triton.configurations import configurations
from attnopt.codegen.triton.decode_tiles import decode_tiles
from attnopt.codegen.triton.prefill import Form
from attnopt.codegen.triton.ranking import Question, corrections, predicted, ranked, target_of, written
from attnopt.codegen.triton.tiles import ARCHITECTURES, TABLE, Tile
from attnopt.ir.spec import parse

AMPERE = TABLE["sm_80"][128]


def question(line, architecture="sm_80", family="prefill"):
    return Question(family, parse(line), 128, 128, "bfloat16", architecture)


@pytest.mark.parametrize("line", ["softmax", "softmax scale(0.125) causal", "softmax causal & window(2048)"])
def test_plain_masks_keep_the_order_of_the_table(line):
    assert ranked(AMPERE, question(line)) == AMPERE


def test_a_narrow_window_asks_for_small_tiles():
    first = ranked(AMPERE, question("softmax causal & window(32)"))[0]
    assert first.block_q < AMPERE[0].block_q
    assert set(ranked(AMPERE, question("softmax causal & window(32)"))) == set(AMPERE)


def test_what_large_tiles_waste_is_priced():
    narrow, target = question("softmax window(16) & lookahead(16)"), target_of("sm_80")
    spent = [predicted(Tile(rows, keys, 4, 2), narrow, target) for rows, keys in ((32, 32), (64, 64), (128, 128))]
    assert spent == sorted(spent)
    assert spent[2] > 1.5 * spent[0]


def test_measurements_replace_the_judgement(monkeypatch):
    worst = {written(tile): 1.0 + 0.5 * place for place, tile in enumerate(reversed(AMPERE))}
    monkeypatch.setattr(ranking, "corrections", lambda: {"sm_80 prefill 128 bfloat16": worst})
    assert ranked(AMPERE, question("softmax causal")) == AMPERE[::-1]
    assert ranked(AMPERE, Question("prefill", parse("softmax causal"), 64, 64, "bfloat16", "sm_80")) == AMPERE


def test_an_architecture_without_a_target_keeps_the_table():
    assert target_of("sm_86") is None
    assert ranked(TABLE["sm_86"][128], question("softmax causal & window(32)", "sm_86")) == TABLE["sm_86"][128]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_is_offered_once(architecture):
    form = Form(128, 128, "bfloat16")
    for made in (
        configurations(parse("softmax causal & window(32)"), form, architecture),
        decode_tiles(architecture, parse("softmax"), form),
    ):
        assert made
        assert len(set(made)) == len(made)


def test_the_file_of_measurements_is_read():
    tables = corrections()
    assert all(factor >= 1.0 for factors in tables.values() for factor in factors.values())
    assert written(Tile(128, 64, 8, 3, persistent=True)) == "128 x 64, 8 warps, 3 stages, persistent"
