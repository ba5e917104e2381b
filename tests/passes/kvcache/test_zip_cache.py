"""ZipCache: blocks of tokens by saliency, as state of a step that is followed for many steps by the reference, in both hosts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cached_step import Step, example
from rounded_steps import inputs_of, opened, rewritten, whole
from torch import nn

import attnopt
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.packing import row_bytes
from attnopt.ir.reference import attend
from attnopt.ir.spec import as_spec
from attnopt.passes import ZipCache
from attnopt.passes.edits.caches.blocks import Blocks

SMALL = ZipCache(block=4)
LINE = (
    "softmax scale({}) cache(k_axis=channel, block=4, k_bits=load(bits, b, h, k), v_bits=load(bits, b, h, k), recent={}, scales=fp16, "
    "v_balance=root)"
)


class Followed:
    """The same steps by the reference: what each query saw, and the bits that its attention gave the tokens of each block."""

    def __init__(self, past, salient, saliency=True):
        self.k, self.v = past
        self.salient, self.size = salient, 4
        count = past[0].shape[2]
        full = count // self.size * self.size
        order = torch.arange(full) % self.size
        self.rank = order.expand(2, 2, -1).clone()
        self.given = torch.zeros(2, 2, count - full)

    def step(self, model, x):
        q, k, v = model.rows(x)
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        total, full = self.k.shape[2], self.rank.shape[2]
        bits = torch.full((2, 4, total), 16.0)
        bits[:, :, :full] = torch.where(self.rank < self.salient, 4.0, 2.0).repeat_interleave(2, 1)
        found = attend(LINE.format(model.width**-0.5, total - full), q, self.k, self.v, bits=bits)
        weights = found.weights.unflatten(1, (2, 2)).sum((2, 3))
        self.given = torch.cat([self.given, torch.zeros(2, 2, 1)], -1) + weights[..., full:]
        if self.given.shape[-1] == self.size:
            share = self.given / torch.arange(self.size, 0, -1)
            self.rank = torch.cat([self.rank, share.argsort(dim=-1, descending=True, stable=True).argsort(-1)], -1)
            self.given = self.given[..., :0]
        return model.finished(x, found.output)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("variant", ["50% salient", "4-bit blocks"])
def test_steps_are_those_of_the_reference(kind, variant):
    host = opened(kind)
    made, candidate = rewritten(SMALL, host, variant)
    blocks, model = Blocks.of(candidate.options["blocks"]), Step().eval()
    x, past = example(past=6)
    followed = Followed(past, blocks.salient)
    names = [s.name for s in made.input_specs]
    state = made.adapt(inputs_of(host, past=6))
    run = made.runner()
    for _ in range(11):
        output, *kept = run(state)
        wanted = followed.step(model, x)
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
        twins = [
            t
            for side, whole_past in (("k", followed.k), ("v", followed.v))
            for t in blocks.packed(side, whole_past, followed.rank)
        ]
        for got, want in zip(kept, twins, strict=True):
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
        saliency = kept[blocks.words("k").index("saliency")][..., 0]
        waiting = followed.given.shape[-1]
        torch.testing.assert_close(saliency[..., 4 - waiting :], followed.given, atol=1e-5, rtol=1e-5)
        for word, got, want in zip(blocks.words("k") + blocks.words("v"), kept, twins, strict=True):
            if word != "saliency":
                differ = (got.float() - want.float()).abs() > 1e-5 * want.float().abs() + 1e-5
                assert differ.float().sum() <= 0.02 * differ.numel(), word  # a code at an edge
        x = wanted
        state = dict(zip(names, (x, *kept), strict=True))
    assert followed.rank.shape[2] == 16


@pytest.mark.exhaustive
def test_what_is_saved_takes_and_returns_the_same_state(tmp_path: Path):
    made, candidate = rewritten(SMALL, opened("torch"), "50% salient")
    made.save_pt2(tmp_path / "step.pt2", {})
    loaded, blocks = attnopt.load(tmp_path / "step.pt2"), Blocks.of(candidate.options["blocks"])
    for count in (11, 33):  # torch.export holds a saved file to two blocks and more
        x, past = example(past=count)
        state = tuple(tuple(blocks.packed(side, x)) for side, x in zip("kv", past, strict=True))
        flat = [[got, *[t for side in kept for t in side]] for got, kept in (loaded(x, state), made.callable()(x, state))]
        for got, want in zip(*flat, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("salient", [2, 4])
def test_a_spec_says_the_same_bytes(salient):
    blocks = Blocks(4, salient)
    clause = as_spec(f"softmax {blocks.words_of_a_spec}").cache
    assert [2 * row_bytes(clause, side, 8, 4.0) for side in "kv"] == [blocks.bytes_per_token(side, 2, 8) for side in "kv"]
    x = torch.randn(1, 2, 8, 8)
    held = [
        t
        for side in "kv"
        for t, word in zip(blocks.packed(side, x), blocks.words(side), strict=True)
        if word not in ("recent", "saliency")
    ]
    assert sum(t.numel() * t.element_size() for t in held) == 8 * sum(blocks.bytes_per_token(side, 2, 8) for side in "kv")


def test_all_salient_is_one_set_and_half_are_two():
    half, all_of_them = SMALL.propose(whole(opened("torch")), None)[::-1]
    assert half.description == (
        "past keys and values of 1 layers by blocks of 4, 50% of the tokens in 4 bits, the others in 2: 128 -> 68.0 bytes per token,"
        " beside 4 exact ones; they come and go as codes, scales, zeros, balance and saliency"
    )
    assert [word for word, _, _ in Blocks.of(all_of_them.options["blocks"]).sets] == ["high"]


class Many(Step):
    def forward(self, x, past):
        return super().forward(x, past)


class Windowed(Step):
    def forward(self, x, past):
        q, k, v = self.rows(x)
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        place = torch.arange(k.shape[2])
        seen = (place[-1] - place < 3)[None, None, None]
        return self.finished(x, nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)), (k, v)


def test_refusals():
    host = FxHost.from_captured(capture(Many().eval(), example(new=3)))
    refused = ZipCache().propose(whole(host), None)
    assert "any number of new tokens" in refused.reason
    host = FxHost.from_captured(capture(Windowed().eval(), example()))
    refused = ZipCache().propose(whole(host), None)
    assert "an attention that sees all of them" in refused.reason
    refused = ZipCache().propose(whole(opened("torch")), None)
    assert refused.reason == "the model was traced where 100*((past//100)) is 0, which torch would take for all lengths"
    refused = ZipCache(block=4).propose(whole(opened("torch", width=6)), None)
    assert refused.reason == "rows of 6 channels cannot be packed four to a byte; the nearest widths are 4 and 8"
