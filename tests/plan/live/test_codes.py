"""What one query does on codes is chosen by time against reading them back, said in the report, and kept in a folder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from live_models import generated, host_of, tokens

import attnopt
from attnopt.codegen.tvm.availability import missing
from attnopt.hosts.eviction.stored import storage
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.layer_attention import AttentionCall, LayerAttention
from attnopt.hosts.module.narrowing import Reach
from attnopt.live.records import dressed
from attnopt.plan.live import codes
from attnopt.plan.live.codes import CodesChooser, held_by, lines
from attnopt.plan.live.converting import Live, noted
from attnopt.plan.timing.timing import Timing
from attnopt.report.data import Report

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
HELD_LAYER = LayerAttention(
    "softmax scale(0.25) causal empty(zero)", AttentionCall(4, 2, 2, 16, 16, 0.25, None, True, None, "float32")
)
INT8 = storage("int8")


def timed(monkeypatch, **seconds):
    """What a clock would tell; both ways run once."""
    ran = []

    def in_turn(calls, **options):
        for name, call in calls.items():
            ran.append((name, call()))
        return {name: Timing((seconds[name],)) for name in calls}

    monkeypatch.setattr(codes, "in_turn", in_turn)
    return ran


def test_the_faster_way_is_taken_and_both_compute_the_same(monkeypatch):
    ran = timed(monkeypatch, codes=1.0, numbers=2.5)
    found = CodesChooser(length=32).choose({"a": HELD_LAYER, "b": HELD_LAYER}, {"a": INT8, "b": INT8})
    assert len(ran) == 2  # layers that are alike are timed once
    torch.testing.assert_close(ran[0][1], ran[1][1], rtol=1e-5, atol=1e-5)
    assert lines(found) == [
        "live, decode on codes: tvm-decode in 2 layers (measured 2.50x the speed of reading the codes back, at 32 tokens)"
    ]


def test_codes_are_read_back_where_that_is_as_fast(monkeypatch):
    timed(monkeypatch, codes=1.0, numbers=1.05)
    found = CodesChooser(length=32).choose({"a": HELD_LAYER}, {"a": INT8})
    assert found["a"].run is None
    assert lines(found) == [
        "live, decode on codes: read back in 1 layers (tvm-decode measured 1.05x the speed of reading the codes back, at 32 tokens)"
    ]


@pytest.mark.parametrize(
    ("held", "words", "why"),
    [
        (HELD_LAYER, "cache(k=int1, v=int1)", "the kernels read no int1 codes"),
        (replace(HELD_LAYER, reach=Reach(4, 8)), "int8", "cuts the few keys that are seen"),
        (replace(HELD_LAYER, call=replace(HELD_LAYER.call, width=512, value_width=512)), "int8", "512"),
    ],
)
def test_why_codes_are_read_back(held, words, why):
    found = CodesChooser().choose({"a": held}, {"a": storage(words)})["a"]
    assert (found.name, found.run) == ("", None) and why in found.why


def idle_model(select="measure"):
    """A live model whose layers hold no kernel, because their own attention was as fast."""
    host = host_of("llama")
    model = shared_copy(host.model)
    idle = {path: LayerAttention("softmax scale(0.25) causal empty(zero)", call) for path, call in noted(model, tokens()).items()}
    made = Live(model, idle=idle, windows=True)
    return host.model, dressed(
        made, Report("cpu", "torch", "model", 0.0, ()), on_codes=CodesChooser(select, length=32, idle=idle, windows=True)
    )


def test_codes_by_hand_get_kernels_which_a_folder_keeps(monkeypatch, tmp_path):
    timed(monkeypatch, codes=1.0, numbers=3.0)
    original, fast = idle_model()
    assert not held_by(fast)
    fast.cache_codes = "int8"
    assert [x.on_codes.name for x in held_by(fast).values()] == ["tvm-decode"] * 2
    said = "live, decode on codes: tvm-decode in 2 layers (measured 3.00x the speed of reading the codes back, at 32 tokens)"
    assert fast.report.notes == (said,)
    fast.save_pretrained(tmp_path)
    monkeypatch.setattr(codes, "measured", None)  # nothing is measured again
    again = attnopt.load(tmp_path)
    assert {path: x.on_codes for path, x in held_by(again).items()} == {path: x.on_codes for path, x in held_by(fast).items()}
    assert torch.equal(generated(again, tokens()), generated(fast, tokens()))
    fast.cache_codes = None
    assert torch.equal(generated(fast, tokens()), generated(original, tokens()))


def test_exact_tokens_beside_codes_are_read_in_pieces_which_a_folder_keeps(tmp_path):
    words = "cache(k=int4, v=int4, group=128, recent=8, scales=fp16, k_basis=hadamard, v_basis=hadamard)"
    _, fast = idle_model("always")
    fast.cache_codes = words
    assert fast.report.notes == ("live, decode on codes: tvm-pieces in 2 layers (the kernel that reads codes)",)
    fast.save_pretrained(tmp_path)
    again = attnopt.load(tmp_path)
    assert again.cache_codes == words and held_by(again)
    assert {path: x.on_codes for path, x in held_by(again).items()} == {path: x.on_codes for path, x in held_by(fast).items()}


def test_another_form_takes_the_place_of_what_the_report_said(monkeypatch):
    timed(monkeypatch, codes=1.0, numbers=1.0)
    _, fast = idle_model()
    fast.cache_codes = "int8"
    fast.cache_codes = "cache(k=int1, v=int1)"
    assert fast.report.notes == ("live, decode on codes: read back in 2 layers (the kernels read no int1 codes)",)
    assert not held_by(fast)
