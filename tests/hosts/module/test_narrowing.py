"""A live model under the mask of a plan generates what plain attention under that mask generates, however it is asked."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import transformers
from live_models import generated, host_of, language_model, tokens

import attnopt
from attnopt.cost.target import read
from attnopt.errors import AttnoptError
from attnopt.hosts.module.narrowing import Reach, joined, reach_of
from attnopt.ir.grammar import parse_expr
from attnopt.ir.reference import reference
from attnopt.passes.sparsity import changed
from attnopt.patterns import recognise
from attnopt.plan.choose import Chosen
from attnopt.plan.live.converting import live
from attnopt.plan.live.layers import Chooser

# Of each layer: what a plan adds to its mask, and the same by hand, from q and k of shape [H, Q, K].
MASKS = {
    "by kernels": (
        ("(window(3) | global(1))", lambda h, q, k: (q - k < 3) | (k < 1)),
        ("(window(2) | global(2) | h == 1)", lambda h, q, k: (q - k < 2) | (k < 2) | (h == 1)),
    ),
    "by the model's own": (("(q - k < 2 | (q - k) % 4 == 0)", lambda h, q, k: (q - k < 2) | ((q - k) % 4 == 0)), None),
}
MASKS["compiled"] = MASKS["by kernels"]
WAYS = {
    "plain": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


COMPILED = pytest.param("compiled", marks=pytest.mark.exhaustive)  # TVM takes its time


@dataclass
class Some(Chooser):
    """Kernels for some phases, for the others none."""

    phases: tuple[str, ...] = ()

    def best(self, phase, shape, spec):
        none = Chosen(SimpleNamespace(name=phase), None, "none is as fast")
        return super().best(phase, shape, spec) if phase in self.phases else none


PHASES = {"by kernels": ("prefill",), "compiled": ("prefill", "decode")}


def by_hand(masks):
    """Plain attention on the whole sequence, each layer under its mask."""

    def attend(module, q, k, v, mask, scaling, **kwargs):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * scaling + mask
        h, rows, columns = (torch.arange(n) for n in scores.shape[1:])
        if (mask := masks[module.layer_idx]) is not None:
            scores = scores.masked_fill(~mask[1](h[:, None, None], rows[:, None], columns), torch.finfo(q.dtype).min)
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    return attend


@pytest.fixture(scope="module")
def pairs():
    made = {}

    def of(name: str):
        if name not in made:
            host, masks = host_of("llama"), MASKS[name]
            word = f"by-hand-{len(made)}"
            transformers.AttentionInterface.register(word, by_hand(masks))
            transformers.AttentionMaskInterface.register(word, transformers.masking_utils.eager_mask)
            plain = language_model("llama")
            plain.config._attn_implementation_internal = word
            sites = recognise(host.graph).sites
            planned = {
                site.source.module: changed(site.spec, mask[0])
                for site, mask in zip(sites, masks, strict=True)
                if mask is not None
            }
            chooser = Some("always", read("cpu"), length=16, phases=PHASES.get(name, ()))
            found = live(host, [], tokens(), chooser, planned)
            assert not found.refusals and all(found.layers[path].narrowed for path in planned)
            made[name] = (plain, found.model)
        return made[name]

    return of


@pytest.mark.parametrize("name", ["by kernels", "by the model's own", COMPILED])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padded", [0, 3])
def test_greedy_tokens_are_those_of_plain_attention(pairs, name, way, padded):
    plain, fast = pairs(name)
    given = tokens(padded=padded)
    want = generated(plain, given, use_cache=False, num_beams=WAYS[way].get("num_beams", 1))
    assert torch.equal(generated(fast, given, **WAYS[way]), want)


@pytest.mark.parametrize("name", ["by kernels", "by the model's own", COMPILED])
def test_a_prompt_in_two_parts(pairs, name):
    plain, fast = pairs(name)
    ids = tokens(length=20)["input_ids"]
    with torch.no_grad():
        first = fast(ids[:, :11], use_cache=True)
        got = fast(ids[:, 11:], past_key_values=first.past_key_values).logits
        assert torch.allclose(got, plain(ids, use_cache=False).logits[:, 11:], atol=1e-4)


def test_another_dtype_is_narrowed_too(pairs):
    plain, fast = pairs("by kernels")
    half, other = (copy.deepcopy(m).double() for m in (plain, fast))
    with torch.no_grad():
        assert torch.allclose(half(**tokens()).logits, other(**tokens()).logits, atol=1e-8)


@pytest.mark.exhaustive  # tracing takes four seconds
def test_torch_compile_takes_it_whole(pairs):
    plain, fast = pairs("by the model's own")
    torch._dynamo.reset()
    compiled = torch.compile(fast.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(tokens()["input_ids"]).logits, plain(tokens()["input_ids"]).logits, atol=1e-4)


def test_a_cache_policy_is_refused_with_the_layer(pairs):
    _, fast = pairs("by kernels")
    with attnopt.cache("key-norm", keep=0.5), pytest.raises(AttnoptError, match=r"hides keys.*layer 0.*outside of attnopt.cache"):
        generated(fast, tokens(), count=2)


def test_one_query_reads_the_keys_that_the_mask_reaches():
    keys = torch.arange(9.0).view(1, 1, 9, 1)
    assert reach_of(parse_expr("causal & (window(3) | global(2))")) == Reach(2, 3)
    assert Reach(2, 3).cut(keys).flatten().tolist() == [0, 1, 6, 7, 8]
    assert Reach(0, 3).cut(keys).flatten().tolist() == [6, 7, 8]
    assert Reach(4, 5).cut(keys) is keys


@pytest.mark.parametrize(
    "mask", ["causal", "causal & (window(3) | h == 1)", "causal & window(8) & (q - k) % 2 == 0", "window(3) & h == 0"]
)
def test_other_masks_cut_nothing_out(mask):
    assert reach_of(parse_expr(mask)) is None


def test_queries_stand_where_they_see_themselves():
    """In a cache of fixed size, and beside numbers that are added."""
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 6, 4)
    seen = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)[None, None]
    own = joined(parse_expr("causal & window(2)"), seen, q, k)
    assert own[0, 0].int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]]
    lowest = torch.finfo(torch.float32).min
    added = joined(parse_expr("causal & window(2)"), torch.where(seen, 0.5, lowest), q, k)
    assert torch.equal(added, torch.where(own, 0.5, lowest))
    assert joined(parse_expr("causal & window(2)"), None, q, k)[0, 0].int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]


@pytest.mark.exhaustive  # TVM compiles three kernels
@pytest.mark.parametrize("adds", ["block_topk(4, 2)", "(window(3) | global(1)) delta(4, dense=causal, tail=4)"])
def test_prompts_alone_are_sparse(adds):
    """On an empty cache, a padded row as it is alone; the rest goes as the model goes."""
    host = host_of("llama")
    planned = {s.source.module: changed(s.spec, adds) for s in recognise(host.graph).sites}
    found = live(host, [], tokens(), Chooser("always", read("cpu"), length=16), planned)
    assert not found.refusals
    held = found.layers["model.layers.0.self_attn"]
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 12, 16, generator=random) for n in (4, 2, 2))
    assert torch.allclose(held.prefill(q, k, v)[0], reference(held.spec, q, k, v), atol=1e-5)
    with torch.no_grad():
        for x in (tokens(), tokens(padded=3)):
            assert not torch.allclose(found.model(**x).logits, host.model(**x).logits, atol=1e-4)
        padded = found.model(**tokens(padded=3)).logits
        alone = found.model(tokens()["input_ids"][:1, 3:], position_ids=torch.arange(3, 12)[None]).logits
        assert torch.allclose(padded[0, 3:], alone[0], atol=1e-4)
        assert torch.allclose(padded[1], found.model(**tokens()).logits[1], atol=1e-4)
        ids, past = tokens()["input_ids"], [found.model(**tokens()).past_key_values for _ in range(2)]
        second = [m(ids, past_key_values=seen).logits for m, seen in zip((found.model, host.model), past, strict=True)]
        assert torch.allclose(*second, atol=1e-4)
