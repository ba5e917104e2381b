"""Folds in live models: read into modules, taken where a measurement or a prediction says so, told of, saved, made again from a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from live_models import COMMON, generated, language_model, tokens

import attnopt
from attnopt.errors import PlanError
from attnopt.hosts.module.host import ModuleHost
from attnopt.hosts.module.layers import CentredRows, PlainNorm
from attnopt.hosts.module.packed import PackedLinear, PackedPart
from attnopt.ir.site import Refusal
from attnopt.passes import ALL
from attnopt.plan.folding import edited, is_fold, offered
from attnopt.plan.live import folding
from attnopt.plan.live.converting import changed, read_back
from attnopt.plan.live.folding import LiveFolding
from attnopt.plan.options.groups import Grouping

PASSES = {p.name: p for p in ALL if is_fold(p)}
GIVEN = tokens(padded=3)
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


def uneven(model):
    """Its gains and biases at random."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def model_of(family: str):
    if family == "opt":
        config = transformers.OPTConfig(ffn_dim=96, word_embed_proj_dim=64, attn_implementation="sdpa", **TINY, **COMMON)
        return uneven(transformers.OPTForCausalLM(config).eval())
    if family == "qwen2":  # biases of q, k and v
        kind = {"num_key_value_heads": 2, "intermediate_size": 96, "attn_implementation": "sdpa"}
        return uneven(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**kind, **TINY, **COMMON)).eval())
    if family == "phi":  # no tied table, one norm of which attention and MLP read the same
        kind = {"intermediate_size": 96, "attn_implementation": "sdpa"}
        return uneven(transformers.PhiForCausalLM(transformers.PhiConfig(**kind, **TINY, **COMMON)).eval())
    return uneven(language_model(family))


def folded(family: str, name: str):
    """(the model, the model with the changes of a fold, these)."""
    model = model_of(family)
    host = ModuleHost.open(model, {**GIVEN, "use_cache": False})
    moves = offered(Grouping(host), PASSES[name])
    assert moves
    changes = read_back(host, edited(host, moves))
    assert not isinstance(changes, Refusal), changes
    return model, changed(model, changes), changes


@pytest.mark.parametrize(
    ("family", "name", "kinds"),
    [
        ("llama", "fold-norm-gain", {"norm": 5, "constant": 11}),
        (
            "gemma2",
            "fold-norm-gain",
            {"norm": 4, "constant": 10},
        ),  # the last norm is read by a tied head, two others by additions
        ("gpt2", "center-stream", {"norm": 4, "constant": 13, "centred-rows": 1}),  # the last norm has a bias, the tied head none
        ("opt", "center-stream", {"norm": 4, "constant": 17, "centred-rows": 1}),
        ("phi", "center-stream", {"norm": 3, "constant": 18}),
        ("llama", "pack-projections", {"packed": 2}),
        ("qwen2", "pack-projections", {"packed": 2}),
        ("opt", "pack-projections", {"packed": 2}),
    ],
)
def test_a_fold_is_read_into_modules(family, name, kinds):
    model, made, changes = folded(family, name)
    assert {kind: sum(c.kind == kind for c in changes) for kind in {c.kind for c in changes}} == kinds
    before, after = (m(**GIVEN).logits[GIVEN["attention_mask"].bool()].detach() for m in (model, made))
    assert float((before - after).abs().max()) <= 1e-5 * float(before.abs().max())
    assert torch.equal(generated(model, GIVEN), generated(made, GIVEN))


def test_modules_of_a_folded_model():
    _, made, _ = folded("llama", "fold-norm-gain")
    assert isinstance(made.model.norm, PlainNorm)
    assert made.model.norm.weight is None
    _, made, _ = folded("gpt2", "center-stream")
    assert isinstance(made.transformer.wte, CentredRows)
    assert made.transformer.wte.weight is made.lm_head.weight
    assert isinstance(made.transformer.ln_f, torch.nn.LayerNorm)
    _, made, _ = folded("llama", "pack-projections")
    first = made.model.layers[0].self_attn
    assert isinstance(first.q_proj, PackedLinear)
    assert isinstance(first.v_proj, PackedPart)


def test_the_model_that_was_given_stays_as_it_was():
    model = model_of("llama")
    state = {name: x.clone() for name, x in model.state_dict().items()}
    attnopt.optimize(model, target="cpu", passes=["fold-norm-gain", "pack-projections"], select="always")
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert isinstance(model.model.layers[0].self_attn.q_proj, torch.nn.Linear)


@pytest.mark.parametrize("name", ["fold-norm-gain", "pack-projections"])
def test_folds_are_told_saved_and_made_again(name, tmp_path):
    model = model_of("llama")
    fast = attnopt.optimize(model, target="cpu", passes=[name], select="always")
    (said,) = fast.report.rewrites
    assert said.kept
    assert {s.rewrite for s in fast.plan.steps} == {name}
    tokens_made = generated(fast, GIVEN)
    assert torch.equal(tokens_made, generated(model, GIVEN))
    fast.save_pretrained(tmp_path / "fast")
    assert torch.equal(generated(attnopt.load(tmp_path / "fast"), GIVEN), tokens_made)
    again = attnopt.optimize(model, target="cpu", plan=fast.plan)
    assert torch.equal(generated(again, GIVEN), tokens_made)
    assert again.plan.steps == fast.plan.steps


@pytest.mark.parametrize(("rewrite", "kind"), [("dynamic-int8", "Int8Linear"), ("round-weights", "RoundedLinear")])
def test_layers_are_rounded_after_their_folds(rewrite, kind, tmp_path):
    """The packed layer is one that codes are chosen for, under the name of its own module."""
    model, data = model_of("llama"), [tokens(40, 12, 2)]
    wanted = {"passes": ["fold-norm-gain", "pack-projections", rewrite], "budget": 5.0, "calibration": data, "minimise": "memory"}
    fast = attnopt.optimize(model, target="cpu", select="always", **wanted)
    assert type(fast.model.layers[0].self_attn.q_proj.layer).__name__ == kind
    assert [s.rewrite for s in fast.plan.steps][5:7] == ["pack-projections"] * 2
    fast.save_pretrained(tmp_path / "fast")
    assert torch.equal(generated(attnopt.load(tmp_path / "fast"), GIVEN), generated(fast, GIVEN))
    again = attnopt.optimize(model, target="cpu", plan=fast.plan, calibration=data)
    assert torch.equal(generated(again, GIVEN), generated(fast, GIVEN))


def test_what_no_group_takes_is_told_where_it_was_asked_for():
    fast = attnopt.optimize(language_model("llama"), target="cpu", passes=["center-stream", "dynamic-int8", "quest"])
    said = {r.name: (r.description, r.why) for r in fast.report.rewrites}
    assert said["center-stream"] == ("nothing proposed", "a rms norm reads the stream: it sees the mean")
    for name in ("dynamic-int8", "quest"):
        assert said[name] == ("not tried", "it is approximate, and no budget says what may be lost: budget=0.01, for example")


def judged(monkeypatch, ratio: float, name: str = "fold-norm-gain", select: str = "measure"):
    """The report of a fold that is measured so."""
    monkeypatch.setattr(LiveFolding, "measured", lambda *_: ratio)
    fast = attnopt.optimize(model_of("llama"), target="cpu", passes=[name], select=select)
    (said,) = fast.report.rewrites
    return fast, said


def test_a_fold_that_is_no_faster_is_not_taken(monkeypatch):
    fast, said = judged(monkeypatch, 0.99)
    assert not said.kept
    assert said.why.startswith("measured 0.990 of the time before")
    assert fast.plan.steps == ()
    assert not isinstance(fast.model.norm, PlainNorm)


def test_a_fold_that_is_faster_is_taken(monkeypatch):
    fast, said = judged(monkeypatch, 0.9)
    assert said.kept
    assert isinstance(fast.model.norm, PlainNorm)
    assert any(note.startswith("measured on a prompt") for note in fast.report.notes)


def test_a_prediction_does_not_say_whether_a_cpu_gains_by_packed_layers(monkeypatch):
    _, said = judged(monkeypatch, 0.5, "pack-projections", "model")
    assert not said.kept
    assert said.why.endswith("only a measurement tells")


def test_what_modules_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr(folding, "read_back", lambda *_: Refusal("it is elsewhere", "there"))
    fast = attnopt.optimize(model_of("llama"), target="cpu", passes=["fold-norm-gain"], select="always")
    (said,) = fast.report.rewrites
    assert not said.kept
    assert "a live model cannot hold it: it is elsewhere" in said.why
    monkeypatch.setattr(folding, "read_back", lambda *_: [])
    fast = attnopt.optimize(model_of("llama"), target="cpu", passes=["fold-norm-gain"], select="always")
    assert "none of them holds it" in fast.report.rewrites[0].why


def test_a_fold_of_a_plan_that_a_model_cannot_hold_is_an_error(monkeypatch):
    plan = attnopt.optimize(model_of("llama"), target="cpu", passes=["fold-norm-gain"], select="always").plan
    monkeypatch.setattr(folding, "read_back", lambda *_: Refusal("it is elsewhere", "there"))
    with pytest.raises(PlanError, match="it is elsewhere"):
        attnopt.optimize(model_of("llama"), target="cpu", plan=plan)
    with pytest.raises(PlanError, match="has no"):
        attnopt.optimize(model_of("gpt2"), target="cpu", plan=plan)


def test_no_fold_is_tried_where_weights_do_not_fit_twice(monkeypatch):
    monkeypatch.setattr(folding, "left", lambda: 1000.0)
    fast = attnopt.optimize(model_of("llama"), target="cpu", passes=["fold-norm-gain"], select="always")
    (said,) = fast.report.rewrites
    assert (said.description, said.kept) == ("not tried", False)
    assert "of weights again" in said.why


def test_a_folded_model_is_optimised_again(tmp_path):
    """Changes of both are in the folder."""
    model = model_of("llama")
    first = attnopt.optimize(model, target="cpu", passes=["fold-norm-gain"], select="always")
    both = attnopt.optimize(first, target="cpu", passes=["pack-projections"], select="always")
    assert isinstance(both.model.layers[0].self_attn.q_proj, PackedLinear)
    assert torch.equal(generated(both, GIVEN), generated(model, GIVEN))
    both.save_pretrained(tmp_path / "both")
    assert torch.equal(generated(attnopt.load(tmp_path / "both"), GIVEN), generated(model, GIVEN))


def test_a_plan_without_folds_changes_nothing_here():
    host = ModuleHost.open(model_of("llama"), {**GIVEN, "use_cache": False})
    plan = attnopt.optimize(model_of("llama"), target="cpu", passes=["fold-norm-gain"], select="always").plan
    made = LiveFolding("always", None, "torch", (), (), inputs={**GIVEN, "use_cache": False})  # type: ignore[arg-type]
    assert made.again(host, []).host is host
    assert made.again(host, [replace(s) for s in plan.steps]).host.folds


def test_a_layer_in_codes_that_mixes_its_input_is_no_fold():
    """GPT-2's layers are Conv1D: the matrix that mixes stands beside the codes, and is no layer of its own."""
    wanted = {"passes": ["quest-rounding"], "budget": 50.0, "calibration": [tokens(40, 12, 2)], "minimise": "memory"}
    fast = attnopt.optimize(model_of("gpt2"), target="cpu", select="always", **wanted)
    assert {s.rewrite for s in fast.plan.steps} == {"quest-rounding"}
    assert type(fast.transformer.h[0].mlp.c_proj).__name__ == "RoundedLinear"
