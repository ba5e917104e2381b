"""Keys of a live model that are kept in few channels before they are turned: positions, policies, codes, folders, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from live_models import generated, host_of, tokens
from narrow_models import narrowed
from shrunk_models import seen
from transformers import DynamicCache

import attnopt
from attnopt.cost.target import read
from attnopt.errors import AttnoptError
from attnopt.hosts.eviction.coded import bytes_per_token
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.lifting import Lifting, Turn, lifting
from attnopt.hosts.module.reshaping import reshaped
from attnopt.ir.block import HeadNorm, Lift, Projection, Rotary
from attnopt.ir.block_reference import as_rows, rows, turned
from attnopt.ir.site import Refusal
from attnopt.live.records import dressed, load_live
from attnopt.live.telling import lines
from attnopt.passes.factorize.eigen_attention import EigenAttention
from attnopt.patterns import recognise
from attnopt.patterns.block import find_blocks
from attnopt.plan.live.codes import CodesChooser
from attnopt.plan.live.converting import Live, live, read_back
from attnopt.plan.live.generating import Used
from attnopt.plan.live.layers import Chooser
from attnopt.plan.live.steps import filled
from attnopt.plan.options.groups import Grouping
from attnopt.report.data import Report


def lifted():
    """(the graph, the live model) with keys of 8 channels of 16 in the cache."""
    return narrowed("llama", 8, 16)


@pytest.mark.parametrize(
    ("first", "dims", "interleaved", "scaling"), [(0, 16, False, 1.0), (2, 8, True, 1.5), (0, 8, False, 1.0)]
)
def test_a_turn_is_that_of_the_block_and_can_be_undone(first, dims, interleaved, scaling):
    frequencies, positions = torch.rand(dims // 2), torch.tensor([[3, 4, 9], [0, 1, 2]])
    turn, x = Turn(dims, first, interleaved, tuple(frequencies.tolist()), scaling), torch.randn(2, 3, 3, 16)
    step = Rotary(dims, first, interleaved, frequencies, None, scaling, None)
    cos, sin = turn.waves(positions, 16)
    made = x * cos + turn.partners(x) * sin
    torch.testing.assert_close(made, turned(step, x.transpose(1, 2), positions).transpose(1, 2))
    torch.testing.assert_close(turn.undone(made, cos, sin), x)


def test_the_block_of_the_graph_says_how_keys_are_lifted():
    made, _ = lifted()
    site = recognise(made.graph).sites[1]
    (block,) = find_blocks(made.graph, [site])
    assert [type(step) for step in block.streams["k"]] == [Projection, Lift, Rotary]
    assert "k lifted from 8 channels" in str(block)
    x, k = made.tap([block.k.input, site.k.value], tokens())
    found = rows(block, "k", x.view(2, 12, -1))
    torch.testing.assert_close(found, as_rows(site.k, k, site.axes), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_holes_of_a_mask_and_pieces_of_a_text_are_counted_as_the_model_counts_them():
    """A text that is padded behind its first part goes on as the text alone does."""
    _, fast = lifted()
    ids = tokens()["input_ids"][:1]
    alone = fast(ids, use_cache=False).logits[:, 6:]
    padded = torch.cat([ids[:, :6], torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    past = fast(padded, attention_mask=mask).past_key_values
    mask = torch.cat([mask, torch.ones(1, 6, dtype=torch.long)], 1)
    for at in (6, 9):
        places = torch.arange(at, at + 3)[None]
        found = fast(ids[:, at : at + 3], attention_mask=mask[:, : 9 + at - 3], past_key_values=past, position_ids=places).logits
        torch.testing.assert_close(found, alone[:, at - 6 : at - 3], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_padded_batch_without_positions_counts_its_padding_too():
    _, fast = lifted()
    given = tokens(padded=3)
    ids, mask = given["input_ids"], given["attention_mask"]
    wanted = fast(**given, use_cache=False).logits[:, 8:]
    past = fast(ids[:, :8], attention_mask=mask[:, :8]).past_key_values
    found = [fast(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=past).logits for t in range(8, 12)]
    torch.testing.assert_close(torch.cat(found, 1), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_positions_that_count_nothing_are_an_error():
    _, fast = lifted()
    ids = tokens()["input_ids"]
    past = fast(ids).past_key_values
    with pytest.raises(AttnoptError, match="positions do not count the tokens"):
        fast(ids[:, :1], past_key_values=past, position_ids=torch.tensor([[20]]))
    with pytest.raises(AttnoptError, match="not told the positions"):
        lifting(Turn(2, 0, False, (1.0,), 1.0), torch.zeros(1, 1, 2), None, None, False)


def test_a_layer_with_a_window_has_fewer_tokens_than_positions():
    turn, up = Turn(2, 0, False, (1.0,), 1.0), torch.eye(2)[None]
    made = Lifting(turn, up, torch.tensor([[9]]), None, True)
    assert made.counted(4, 10).tolist() == [[6, 7, 8, 9]]
    seen = torch.tensor([[False, True, True, True, False]])  # the last place of a fixed cache is not written
    assert Lifting(turn, up, torch.tensor([[9]]), seen[:, None, None], True).counted(5, 4)[0, 1:4].tolist() == [7, 8, 9]


@pytest.mark.parametrize("name", ["snapkv", "expected-attention"])
def test_policies_choose_by_keys_as_attention_reads_them(name):
    _, fast = lifted()
    given = tokens(padded=3)
    small = {"window": 3} if name == "snapkv" else {"sinks": 2, "future": 8}
    with attnopt.cache(name, keep=1.0, **small):
        kept = generated(fast, given)
    assert torch.equal(kept, generated(fast, given))
    with torch.no_grad():  # a layer that forgets, and what its mask shows of all
        past, ids = DynamicCache(config=fast.config), given["input_ids"][1:]
        with attnopt.cache(name, layers={0: 0.5}, every=None, **small) as session:
            fast(ids[:, :9], past_key_values=past)
            found = fast(ids[:, 9:], past_key_values=past).logits
        gone = [sorted(set(range(9)) - set(places)) for places in session.layers[0].places[0].tolist()]
        assert session.layers[0].k.read().shape == (1, 2, 8, 8)  # 5 of 9 and 3 more
        torch.testing.assert_close(found, masked(fast, ids, gone), atol=1e-4, rtol=1e-4)


def masked(model, ids, gone):
    """Logits from the tenth token on, where queries there do not see these keys of the first layer, by key head."""
    made, mask = shared_copy(model), torch.ones(1, 2, 12, 12, dtype=torch.bool).tril()
    for head, keys in enumerate(gone):
        mask[:, head, 9:, keys] = False
    hook = lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask.repeat_interleave(2, 1)})  # noqa: E731
    made.model.layers[0].self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    return made(ids, use_cache=False).logits[:, 9:]


def test_a_folder_and_codes_hold_what_is_kept(tmp_path):
    host, (made, fast) = host_of("llama"), lifted()
    kept = dressed(Live(shared_copy(fast), tuple(read_back(host, made))), Report("cpu", "torch", "always", 0.0, ()))
    kept.save_pretrained(tmp_path)
    again = load_live(tmp_path)
    assert torch.equal(generated(again, tokens(padded=3)), generated(fast, tokens(padded=3)))
    assert bytes_per_token(again(**tokens()).past_key_values) == 2 * 2 * (8 + 16) * 4  # layers, heads, channels, bytes
    said = lines(Live(fast, tuple(read_back(host, made))), {})
    assert said == [
        "live, cache: keys of 8 and values of 16 channels, of 16, keys lifted and turned whenever they are read, in 2 layers"
    ]
    again.cache_codes = "int8"
    assert bytes_per_token(again(**tokens()).past_key_values) == 2 * 2 * (8 + 16 + 2 * 8)  # and steps and zero points
    assert generated(again, tokens(padded=3)).shape == (2, 20)


def test_codes_of_lifted_keys_are_read_back():
    host, (made, _) = host_of("llama"), lifted()
    found = live(host, read_back(host, made), tokens(), Chooser("always", read("cpu"), length=16), fuses=True)
    chooser = CodesChooser("always", idle=found.idle)
    said = chooser(found.model, attnopt.parse("softmax cache(k=int8, v=int8)").cache)
    assert said == ["live, decode on codes: read back in 2 layers (its keys are made anew when they are read)"]
    cache = filled(Used(found.model), {**found.idle, **found.layers}, 1, 4)
    assert [x.keys.shape for x in cache.layers] == [(1, 2, 4, 8)] * 2


def test_the_pass_offers_narrow_keys_where_a_host_caches_beside_its_graph():
    host, offers = host_of("llama"), EigenAttention(thresholds=(0.5,), multiple=4)
    found = {}
    for lifts in (False, True):
        own = replace(host, lifts=lifts)
        group = Grouping(own).of("block")[0]
        candidates = offers.propose(group, seen(own, tokens()))
        found[lifts] = {tuple(c.options["ranks"]) for c in candidates}
    assert {keys for keys, _ in found[False]} == {16}
    assert found[True] > found[False] and min(keys for keys, _ in found[True]) < 16


def test_normalised_keys_and_layers_without_a_turn_are_refused():
    host, (made, _) = host_of("llama"), lifted()
    sites = [recognise(each.graph).sites[0] for each in (host, made)]
    old, new = (find_blocks(each.graph, [site])[0] for each, site in zip((host, made), sites, strict=True))
    unturned = replace(old, streams={**old.streams, "k": tuple(s for s in old.streams["k"] if not isinstance(s, Rotary))})
    found = reshaped("model.layers.0.self_attn", (sites[0], unturned), (sites[1], new), host.model)
    assert isinstance(found, Refusal) and "nothing turns them" in found.reason
    norm = HeadNorm(None, "head", torch.zeros(2, 16))
    found = reshaped("model.layers.0.self_attn", (sites[0], with_step(old, norm)), (sites[1], new), host.model)
    assert isinstance(found, Refusal) and "a norm or a rotation" in found.reason


def with_step(block, step):
    return replace(block, streams={**block.streams, "k": (*block.streams["k"], step)})
