"""A cache policy that a live model is given under one budget with its rewrites, uses in `generate`, and keeps in its folder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from live_models import generated, language_model, tokens

import attnopt
from attnopt.analysis.calibration import Calibration
from attnopt.errors import AttnoptError, BudgetError, PlanError, UnknownPolicy, UnreadableModel, UnsupportedFormat
from attnopt.hosts.eviction.chosen import ChosenPolicy
from attnopt.ir.site import Refusal
from attnopt.passes.kvcache.eviction import BY_NAME, QFilters, SinksWindow, Snapkv
from attnopt.plan.judge.budget import Budget
from attnopt.plan.live.evicting import half_of, proposed, sequences

ROWS = torch.randint(2, 97, (32, 128), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ROWS.split(8)]
POLICIES = (SinksWindow(), Snapkv(window=8))
BUDGET = 4.0  # nats: the model is random, and every token counts


@pytest.fixture(scope="module")
def model():
    return language_model("llama")


@pytest.fixture(scope="module")
def fast(model):
    """int8 layers and a policy."""
    given = {"calibration": DATA, "passes": ["dynamic-int8"], "minimise": "memory", "select": "always"}
    return attnopt.optimize(model, budget=BUDGET, policies=POLICIES, **given)


def held(model, **given):
    """A cache after generation, as the lengths of what its layers hold."""
    out = generated(model, tokens(length=24), return_dict_in_generate=True, **given)
    return [0 if x.keys is None else x.keys.shape[2] for x in out.past_key_values.layers], out.sequences


def test_the_policy_belongs_to_the_model(model, fast):
    assert fast.cache_policy.policy in POLICIES and fast.plan.steps
    lengths, alone = held(fast)
    with attnopt.cache(fast.cache_policy):
        assert torch.equal(held(fast)[1], alone)
    assert max(lengths) < 24 + 7
    assert held(model)[0] == [24 + 7] * 2


def test_a_policy_around_the_call_is_used_in_its_place(fast):
    with attnopt.cache("sinks-window", keep=1.0) as whole:
        _, kept = held(fast)
    assert whole.evicted == 0 and whole.layers[0].seen == 24 + 7
    policy, fast.cache_policy = fast.cache_policy, None
    lengths, full = held(fast)
    fast.cache_policy = policy
    assert lengths == [24 + 7] * 2 and torch.equal(kept, full)


def test_the_loss_is_that_of_policy_and_rewrites_together(model, fast):
    """Measured again by hand on the half that judged."""
    (line,) = [n for n in fast.report.notes if n.startswith(f"cache policy {fast.cache_policy}: ")]
    _, holding = sequences(*calibration().split(0))
    with torch.no_grad():
        expected = model(holding).logits[:, 96:]
        with fast.cache_policy.session(every=None):
            past = fast(holding[:, :96]).past_key_values
            found = fast(holding[:, 96:], past_key_values=past).logits
    p, q = (x.double().log_softmax(-1) for x in (expected, found))
    assert f"mean KL {float((p.exp() * (p - q)).sum(-1).mean()):.3g} " in line
    assert fast.report.budget == BUDGET and "longer prompts were not judged" in line


def test_a_folder_and_a_plan_hold_it(model, fast, tmp_path):
    fast.save_pretrained(tmp_path / "fast")
    again = attnopt.load(tmp_path / "fast")
    assert again.cache_policy == fast.cache_policy
    assert torch.equal(held(again)[1], held(fast)[1])
    replayed = attnopt.optimize(model, plan=fast.plan, select="always")
    assert replayed.cache_policy == fast.cache_policy and replayed.plan.cache_policy == fast.plan.cache_policy
    with pytest.raises(UnsupportedFormat, match="this one is traced"):
        attnopt.optimize(model, {**tokens(), "use_cache": False}, plan=fast.plan)


def test_caches_that_cannot_forget_are_refused_with_the_way_out(fast):
    with pytest.raises(AttnoptError, match="cannot forget tokens"):
        generated(fast, tokens(), cache_implementation="static")


def test_no_policy_is_better_than_one_over_the_budget(model):
    policy, said = proposed(model, model, calibration(), Budget.of(1e-9), [SinksWindow()], minimise="time", seed=0)
    assert policy is None
    assert said[0].startswith("no cache policy holds the budget of 1e-09: with the whole cache the rewrites lose 0")
    assert "sinks-window keep 0.5: loses at most" in said[1]


def test_filters_are_made_of_the_texts_and_travel_as_data(model):
    policy, _ = proposed(model, model, calibration(), Budget.of(50.0), [QFilters()], minimise="time", seed=0)
    again = ChosenPolicy.from_json(policy.to_json(), BY_NAME)
    assert again.policy.filters.keys() == {0, 1}
    assert all(torch.equal(again.policy.filters[i], policy.policy.filters[i]) for i in (0, 1))


@pytest.mark.parametrize(
    ("budget", "data", "says"),
    [
        (Budget(metric="cosine", limit=0.1), DATA, "the budget is in cosine"),
        (Budget.of(1.0), [{name: x[:, :100] for name, x in b.items()} for b in DATA], "a half of the data has 0 of 16"),
    ],
)
def test_what_cannot_be_judged_is_a_line(model, budget, data, says):
    policy, (line,) = proposed(model, model, calibration(data), budget, POLICIES, minimise="time", seed=0)
    assert policy is None and says in line


def test_windows_of_every_layer_leave_nothing_to_a_policy():
    model = language_model("mistral")
    policy, (line,) = proposed(model, model, calibration(), Budget.of(1.0), [SinksWindow()], minimise="time", seed=0)
    assert policy is None and "a sliding window of 6 keeps its own cache" in line


def test_padded_texts_are_left_out_and_lengths_made_equal():
    mask = torch.ones_like(ROWS)
    mask[0, :3] = 0
    rows, longer = Calibration(({"input_ids": ROWS, "attention_mask": mask},)), torch.cat([ROWS, ROWS], 1)
    found = sequences(rows, Calibration(({"input_ids": longer, "attention_mask": torch.ones_like(longer)},)))
    assert not isinstance(found, Refusal)
    assert [tuple(x.shape) for x in found] == [(31, 128), (32, 128)]


def test_the_rewrites_are_given_half():
    assert half_of(Budget(metric="kl", limit=0.02)) == Budget(metric="kl", limit=0.01)
    assert half_of(Budget(metric="quality", drop=0.02)).drop == 0.02


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"policies": ["snap"], "budget": 1.0}, UnknownPolicy, "Known: sinks-window"),
        ({"policies": ["snapkv"]}, BudgetError, "a cache that forgets is not exact"),
    ],
)
def test_what_is_asked_wrongly_says_what_to_do(model, given, error, says):
    with pytest.raises(error, match=says):
        attnopt.optimize(model, **given)


def test_a_plan_has_its_own(model, fast):
    with pytest.raises(PlanError, match="Leave policies= or plan= out"):
        attnopt.optimize(model, plan=fast.plan, policies=["snapkv"], budget=1.0)


def test_a_record_of_another_attnopt_is_named(fast):
    record = {**fast.cache_policy.to_json(), "policy": "oracle"}
    with pytest.raises(UnreadableModel, match="choose a policy again"):
        ChosenPolicy.from_json(record, BY_NAME)
    assert replace(fast.cache_policy, keep=0.5) == ChosenPolicy.from_json(replace(fast.cache_policy, keep=0.5).to_json(), BY_NAME)


def calibration(batches=DATA):
    return Calibration(tuple(batches), frozenset(("input_ids", "attention_mask")), True)
