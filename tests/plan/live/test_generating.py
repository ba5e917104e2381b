"""What generation asks of a traced prompt, and the time of both phases of a live model."""

from __future__ import annotations

import re

import pytest
import torch
from live_models import host_of, language_model, tokens

import attnopt
from attnopt.cost.workload import parse_workload
from attnopt.hosts.eviction.chosen import ChosenPolicy
from attnopt.hosts.eviction.stored import storage
from attnopt.passes.kvcache.eviction import SinksWindow
from attnopt.patterns import recognise
from attnopt.plan.live.generating import Used, in_blocks, on_prompts, paces, room_to_step, usual
from attnopt.plan.timing.shaped import resized


def test_a_decoding_step_is_a_prompt_of_one_token():
    asked = parse_workload("prefill:512 decode:1024x8@3")
    made = on_prompts(asked)
    assert [(x.kind, x.batch, x.query, x.past, x.weight) for x in made.loads] == [
        ("prefill", 1, 512, 0, 0.25),
        ("prefill", 8, 1, 0, 0.75),
    ]
    assert str(made) == str(asked)


def test_the_usual_weighs_calls_as_generation_makes_them():
    prompt, step = usual(256).loads
    assert (prompt.query, step.past) == (256, 256) and abs(step.weight / prompt.weight - 128) < 1e-9


def test_the_traced_prompt_computes_such_a_step():
    host = host_of("llama")
    (bound,) = on_prompts(parse_workload("decode:64x3")).bind(recognise(host.graph).sites)
    given = resized(host, tokens(), bound.sizes)
    assert given["input_ids"].shape == (3, 1)
    with torch.no_grad():
        expected = host.model(**given).logits
    torch.testing.assert_close(host.runner()(given)[0], expected)


def test_both_phases_are_timed_with_the_policy_on():
    model = language_model("llama")
    policy = ChosenPolicy(SinksWindow(), 0.5)
    found = paces(
        {"before": Used(model), "after": Used(model, policy, storage("int8"))}, tokens(rows=1)["input_ids"], seconds=0.01
    )
    assert all(pace.first > 0 and pace.step > 0 for pace in found.values())
    assert re.fullmatch(
        r"[\d.e+-]+ ms to the first token, then [\d.e+-]+ tokens a second, \d+ bytes of cache a token", str(found["after"])
    )


def test_steps_stay_within_the_positions_that_a_model_has_learned():
    model, prompt = language_model("gpt2"), tokens(rows=1, length=64)["input_ids"]
    assert model.config.max_position_embeddings == 64
    assert paces({"before": Used(model)}, prompt, seconds=0.2)["before"].step > 0


@pytest.mark.parametrize(("positions", "length"), [(64, 64), (64, 20), (1024, 1000), (4096, 256), (8, 8)])
def test_a_warm_up_and_all_rounds_have_their_positions(positions, length):
    kept, most, block = room_to_step(positions, length)
    assert 1 <= kept <= length and most >= 1 and kept + (2 * most + 1) * block <= positions
    assert positions < length + 105 or (kept, most, block) == (length, 10, 5)


def test_a_search_for_time_prices_decoding_too():
    rows = torch.randint(2, 97, (32, 24), generator=torch.Generator().manual_seed(0))
    found = attnopt.optimize(
        language_model("llama"), budget=0.5, calibration=list(rows.split(8)), passes=["dynamic-int8"], select="model"
    )
    assert "planned for prefill:24 decode:24@128; a step of decoding counts as a prompt of one token" in found.report.notes


def test_steps_take_turns_in_blocks_where_positions_suffice():
    order: list[str] = []
    times = in_blocks({name: lambda name=name: order.append(name) for name in "ab"}, seconds=0.0, most=3, block=4)
    assert set(times) == {"a", "b"}
    assert len(times["a"].runs) == 3
    assert order[:8] == ["a"] * 4 + ["b"] * 4
