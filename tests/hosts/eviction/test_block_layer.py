"""A live cache in blocks of tokens computes what its clause says, one token after the other, however many come at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from live_models import generated, language_model, tokens

import attnopt
from attnopt.codegen.tvm import piece_attention
from attnopt.errors import AttnoptError, InputMismatch
from attnopt.hosts.eviction.block_layer import BlockLayer
from attnopt.hosts.eviction.coded import bytes_per_token
from attnopt.hosts.eviction.live_forms import live_form
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.interface import HELD, attnopt_attention
from attnopt.hosts.module.layer_attention import AttentionCall, LayerAttention
from attnopt.hosts.module.model import as_live
from attnopt.ir.kv_cache import attend_cache
from attnopt.ir.reference import attend
from attnopt.ir.token_blocks import TokenBlocks
from attnopt.live.records import dressed
from attnopt.plan.live.codes import with_kernel
from attnopt.plan.live.converting import Live
from attnopt.report.data import Report

FORMS = {salient: TokenBlocks(4, salient).words_of_a_spec for salient in (2, 4)}
READ = "cache(k_axis=channel, block=4, k_bits=load(bits, b, h, k), v_bits=load(bits, b, h, k), recent={}, scales=fp16, v_balance=root)"


@pytest.fixture(scope="module")
def model():
    return language_model("llama")


def in_form(model, words):
    fast = as_live(shared_copy(model), None, None, {})
    fast.cache_codes = words
    return fast


class Followed:
    """One query after the other by the reference, and the bits that their weights give the tokens of each block."""

    def __init__(self, salient):
        self.salient, self.rank, self.given = salient, None, None

    def step(self, q, k, v, scale):
        """q [B, 4, 1, D] of the newest token of k, v [B, 2, T, D]."""
        if k.shape[2] == 1:
            self.rank, self.given = torch.zeros(len(k), 2, 0).long(), k.new_zeros(len(k), 2, 0)
        full, total = self.rank.shape[2], k.shape[2]
        bits = k.new_full((len(k), 4, total), 16.0)
        bits[..., :full] = torch.where(self.rank < self.salient, 4.0, 2.0).repeat_interleave(2, 1)
        found = attend(f"softmax scale({scale!r}) {READ.format(total - full)}", q, k, v, bits=bits)
        self.given = torch.cat([self.given, k.new_zeros(len(k), 2, 1)], -1)
        self.given += found.weights.unflatten(1, (2, 2)).sum((2, 3))[..., full:]
        if self.given.shape[-1] == 4:
            share = self.given / torch.arange(4, 0, -1)
            self.rank = torch.cat([self.rank, share.argsort(dim=-1, descending=True, stable=True).argsort(-1)], -1)
            self.given = self.given[..., :0]
        return found.output


def by_hand(salient):
    """The model on a cache of exact tokens, whose attention is that of the reference for one token after the other."""
    followed = {}

    def attention(module, q, k, v, mask, scaling, **kwargs):
        each = followed.setdefault(module.layer_idx, Followed(salient))
        before = k.shape[2] - q.shape[2]
        parts = [each.step(q[:, :, i : i + 1], *(x[:, :, : before + i + 1] for x in (k, v)), scaling) for i in range(q.shape[2])]
        return torch.cat(parts, 2).transpose(1, 2), None

    name = f"blocks-by-hand-{salient}"
    transformers.AttentionInterface.register(name, attention)
    transformers.AttentionMaskInterface.register(name, transformers.masking_utils.eager_mask)
    made = language_model("llama")
    made.set_attn_implementation(name)
    return made


@pytest.mark.parametrize("salient", FORMS)
def test_prompts_and_new_tokens_are_those_of_the_spec(salient):
    """In float64, where no last bit moves a number over the border between two codes; a prompt of ten is two blocks and a half."""
    fast, plain = in_form(language_model("llama").double(), FORMS[salient]), by_hand(salient).double()
    given = tokens(length=10)
    out, expected = (generated(m, given, 9, return_dict_in_generate=True, output_logits=True) for m in (fast, plain))
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), rtol=1e-9, atol=1e-9)
    layer = out.past_key_values.layers[1]
    assert isinstance(layer, BlockLayer) and (layer.state.blocks, layer.state.waiting) == (4, 2)


def test_pieces_of_a_prompt_are_the_prompt():
    fast, ids = in_form(language_model("llama").double(), FORMS[2]), tokens(length=12)["input_ids"]
    with torch.no_grad():
        whole, past, found = fast(ids), None, []
        for piece in ids.split([5, 1, 6], 1):
            made = fast(piece, past_key_values=past)
            past = made.past_key_values
            found.append(made.logits)
        exact = language_model("llama").double()(ids)
    torch.testing.assert_close(torch.cat(found, 1), whole.logits, rtol=1e-9, atol=1e-9)
    differs = (whole.logits - exact.logits).abs().amax((0, 2))
    assert differs[:4].max() < 1e-9 < 1e-3 < differs[4:].min()  # the first block is exact to its own queries, and to no other


def test_sequences_move_together(model):
    """What a beam that was copied goes on with is what it would have gone on with alone."""
    fast, ids = in_form(model, FORMS[2]), tokens(length=14)["input_ids"]
    with torch.no_grad():
        expected = fast(ids.flip(0)[:, 10:], past_key_values=fast(ids.flip(0)[:, :10]).past_key_values).logits
        past = fast(ids[:, :10]).past_key_values
        past.batch_repeat_interleave(2)
        past.batch_select_indices(torch.tensor([0, 2]))
        past.reorder_cache(torch.tensor([1, 0]))
        found = fast(ids.flip(0)[:, 10:], past_key_values=past).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert generated(fast, tokens(), num_beams=3).shape == (2, 20)


def test_bytes_of_a_token_and_a_cache_of_exact_tokens(model):
    """Tokens that nobody saw attended to are rounded as if the first of a block were the salient ones."""
    fast, ids = in_form(model, FORMS[2]), tokens(length=9)["input_ids"]
    with torch.no_grad():
        past = model(ids[:, :8]).past_key_values
        fast(ids[:, 8:], past_key_values=past)
    state, form = past.layers[0].state, TokenBlocks(4, 2)
    full = 2 * 8 * sum(form.bytes_per_token(side, 2, 16) for side in "kv")
    waits = 2 * 2 * (4 * 2 * 16 * 4 + 4)  # a block of places on both sides, and the saliency of one token
    assert (state.blocks, state.waiting, state.bytes) == (2, 1, full + waits)
    assert bytes_per_token(past) == 2 * state.bytes / 18 and past.layers[0].keys.shape == (2, 2, 9, 16)


def test_one_query_reads_sets_by_a_kernel(monkeypatch):
    """What the kernels compute of a set is compared in tests/codegen/test_cache_blocks.py: here the reference stands for them."""
    held = LayerAttention("softmax scale(0.2)", AttentionCall(4, 2, 2, 32, 32, 0.2, None, True, None, "float32"))
    plain, fast = BlockLayer(live_form(FORMS[2])), BlockLayer(live_form(FORMS[2]))
    on_codes, ran, random = with_kernel(held, plain.clause, "tvm-blocks"), [], torch.Generator().manual_seed(0)

    def by_reference(line, q, cache):
        made = attend_cache(line, q, cache)
        ran.append(cache.k.shape[2])
        return made.output, made.lse

    monkeypatch.setattr(piece_attention, "by_tvm", by_reference)
    modules = torch.nn.Module(), torch.nn.Module()
    setattr(modules[1], HELD, replace(held, on_codes=on_codes))
    for count in (9, 1, 1, 1, 1):
        q, k, v = (torch.randn(2, heads, count, 32, generator=random) for heads in (4, 2, 2))
        found = [
            attnopt_attention(m, q, *x.update(k, v), None, scaling=0.2)[0] for m, x in zip(modules, (plain, fast), strict=True)
        ]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain.state.saliency, fast.state.saliency, rtol=1e-4, atol=1e-4)
    assert ran == [4, 4] * 3 + [6, 6] and fast.state.blocks == 3


def test_a_layer_without_attention_counts_its_tokens():
    layer, place = BlockLayer(live_form(FORMS[2])), torch.zeros(2, 1, 5, 1)
    assert torch.equal(layer.update(place, place)[0], place) and layer.get_seq_length() == 5
    assert torch.equal(layer.update(place, place)[0], torch.zeros(2, 1, 10, 1)) and layer.keys.shape == (2, 1, 10, 1)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.keys is None


def test_what_was_made_in_inference_mode_goes_on_outside(model):
    fast, ids = in_form(model, FORMS[2]), tokens(length=12)["input_ids"]
    with torch.inference_mode():
        past = fast(ids[:, :10]).past_key_values
    with torch.no_grad():
        found, expected = fast(ids[:, 10:], past_key_values=past).logits, fast(ids).logits[:, 10:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_it_refuses(model):
    fast, given = in_form(model, FORMS[2]), tokens(padded=2)
    with pytest.raises(AttnoptError, match=r"rows are padded.*cache_codes = .int4"):
        generated(fast, given)
    with pytest.raises(AttnoptError, match="tokens were taken back"):
        generated(fast, tokens(rows=1), prompt_lookup_num_tokens=2)
    with attnopt.cache("sinks-window", keep=0.5), pytest.raises(AttnoptError, match="cannot forget others"):
        generated(fast, tokens())
    fast.set_attn_implementation("eager")
    with pytest.raises(AttnoptError, match="something else than the attention of live models"):
        generated(fast, tokens())
    with pytest.raises(AttnoptError, match="no plain softmax"):
        generated(in_form(language_model("gemma2"), FORMS[2]), tokens())
    with pytest.raises(InputMismatch, match="the salient tokens of a block have 4 bits"):
        in_form(model, FORMS[2].replace("int3", "int4"))


def test_a_folder_keeps_it(model, tmp_path):
    fast = dressed(Live(shared_copy(model)), Report("cpu", "torch", "model", 0.0, ()))
    fast.cache_codes = FORMS[2]
    fast.save_pretrained(tmp_path)
    again = attnopt.load(tmp_path)
    assert again.cache_codes == FORMS[2] and torch.equal(generated(again, tokens()), generated(fast, tokens()))
    again.cache_codes = None
    assert torch.equal(generated(again, tokens()), generated(model, tokens()))
