"""`attnopt.optimize` of a language model that generates: a live model with a report and a plan, saved in a folder and loaded again."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from live_models import generated, host_of, language_model, tokens

import attnopt
from attnopt.codegen.library.sdpa import Sdpa
from attnopt.errors import AccuracyError, BudgetError, InputMismatch, UnreadableModel, UnsupportedFormat
from attnopt.hosts.eviction.coded import CodedLayer, bytes_per_token
from attnopt.hosts.module.interface import HELD, NAME
from attnopt.hosts.module.layers import Int8Linear
from attnopt.hosts.module.model import LiveModel
from attnopt.ir.site import Refusal
from attnopt.live.comparing import Rewritten, compare
from attnopt.plan.live.converting import Live
from attnopt.plan.live.texts import token_batches
from attnopt.plan.options.workshop import Workshop
from attnopt.report.plan import Plan, PlanStep


@pytest.fixture(scope="module")
def model():
    return language_model("llama")


@pytest.fixture(scope="module")
def page(model, tmp_path_factory):
    """What the code of docs/live.md leaves: `fast` is exact, `small` has layers in int8, `again` is read from its folder."""
    text = (Path(__file__).parents[1] / "docs" / "live.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    random = torch.Generator().manual_seed(0)
    left = {
        "model": model,
        "texts": ["".join(chr(97 + int(i)) for i in torch.randint(0, 26, (10,), generator=random)) for _ in range(32)],
        "tok": lambda text: {"input_ids": [ord(c) - 60 for c in text]},
        "folder": tmp_path_factory.mktemp("live") / "small",
        "prompt": tokens(),
        "print": str,
    }
    timed = code.replace(
        "optimize(model", 'optimize(model, minimise="memory", select="always"'
    )  # int8 saves no time at this size
    exec(timed, left)
    return left


@pytest.fixture(scope="module")
def exact(page):
    return page["fast"]


@pytest.fixture(scope="module")
def small(page):
    return page["small"]


def test_the_result_is_a_model_of_the_same_class_that_generates_the_same(model, exact):
    assert isinstance(exact, type(model)) and isinstance(exact, LiveModel) and type(exact).__name__ == "LlamaForCausalLM"
    assert exact.config._attn_implementation == NAME and model.config._attn_implementation == "sdpa"
    assert torch.equal(generated(exact, tokens(padded=2)), generated(model, tokens(padded=2)))


def test_the_report_says_which_kernels_run_in_which_phase(exact):
    text = str(exact.report)
    assert "live, prefill: sdpa in 2 layers" in text and "live, decode: sdpa in 2 layers" in text
    assert {s.rewrite for s in exact.plan.steps} == {"fold-norm-gain", "pack-projections"}  # "always" takes what is exact
    assert len(exact.report.sites) == 2


def test_a_budget_stores_layers_in_codes_and_keeps_generate(model, small):
    assert {s.rewrite for s in small.plan.steps} == {"dynamic-int8"}
    changed = [path for path, module in small.named_modules() if isinstance(module, Int8Linear)]
    assert changed and not any(isinstance(m, Int8Linear) for m in model.modules())
    assert generated(small, tokens()).shape == generated(model, tokens()).shape


def test_the_cache_is_in_codes_in_every_loop(model, small, page):
    words = "cache(k=int8, v=int8)"
    assert (small.cache_codes, small.plan.cache_codes, page["again"].cache_codes) == (words, words, words)
    assert f"the cache is kept as {words}: 192 bytes a token in place of 512" in str(small.report)
    with torch.no_grad():
        assert type(small(**tokens()).past_key_values.layers[0]) is CodedLayer
    assert type(model(**tokens()).past_key_values.layers[0]) is not CodedLayer


@pytest.mark.exhaustive  # dynamo traces each length again
def test_torch_compile_takes_layers_and_caches_in_codes(small):
    torch._dynamo.reset()
    with torch.no_grad():
        whole = torch.compile(small.forward, backend="eager", fullgraph=True)(tokens()["input_ids"], use_cache=False)
        assert torch.equal(whole.logits, small(tokens()["input_ids"], use_cache=False).logits)
    made = copy.deepcopy(small)
    made.forward = torch.compile(made.forward, backend="eager")
    assert torch.equal(generated(made, tokens(padded=2), 3), generated(small, tokens(padded=2), 3))


@pytest.mark.exhaustive  # exports two graphs
def test_the_decoding_step_is_exported_with_layers_in_codes(small, tmp_path):
    """The cache comes and goes as it is: codes of a cache in a graph are asked for by passes=."""
    made = attnopt.export_decoder(small, tmp_path, format="pt2", passes=["fuse-attention"], select="always")
    prefill = attnopt.load(made.prefill)
    given = tokens()
    logits, past = prefill(**given, position_ids=given["attention_mask"].cumsum(1) - 1)
    with torch.no_grad():
        assert torch.allclose(logits, small(**given, use_cache=False).logits, atol=1e-3)
    assert past[0][0].dtype == torch.float32


def test_a_folder_holds_the_whole_of_it(small, tmp_path):
    small.save_pretrained(tmp_path / "fast")
    again = attnopt.load(tmp_path / "fast")
    assert torch.equal(generated(again, tokens()), generated(small, tokens()))
    assert again.report["sites"]
    assert [p for p, m in again.named_modules() if hasattr(m, HELD)] == [p for p, m in small.named_modules() if hasattr(m, HELD)]
    config = json.loads((tmp_path / "fast" / "config.json").read_text())
    assert "attnopt" not in json.dumps(config)
    again.save_pretrained(tmp_path / "second")
    with torch.no_grad():
        assert torch.equal(attnopt.load(tmp_path / "second")(**tokens()).logits, small(**tokens()).logits)


def test_a_plan_is_applied_without_a_search(model, small):
    again = attnopt.optimize(model, plan=small.plan, select="always")
    assert again.report.search is None and len(again.plan.steps) == len(small.plan.steps)
    assert again.cache_codes == small.cache_codes
    with torch.no_grad():
        assert torch.equal(again(**tokens()).logits, small(**tokens()).logits)


def test_a_plan_that_narrows_masks_holds_for_every_token_and_in_its_folder(model, monkeypatch, tmp_path):
    monkeypatch.setattr(Workshop, "kernel_for", lambda self, site, brief=False: Sdpa())  # none that is compiled
    path = "model.layers.0.self_attn"
    step = PlanStep("sinks-window", "site", path, "", "", changes=("mask",), options={"sinks": 1, "window": 3})
    fast = attnopt.optimize(model, plan=Plan("torch", "cpu", "torch", steps=(step,)), select="always")
    assert f"live, {path}: computes 'softmax scale(0.25) causal & (window(3) | global(1)) empty(zero)'" in str(fast.report)
    held = [m for m in fast.modules() if hasattr(m, HELD)]
    assert [getattr(m, HELD).narrowed for m in held] == [True] and held[0] is fast.get_submodule(path)
    assert not torch.equal(generated(fast, tokens()), generated(model, tokens()))
    fast.save_pretrained(tmp_path)
    again = attnopt.load(tmp_path)
    for given in (tokens(), tokens(padded=3)):
        assert torch.equal(generated(again, given), generated(fast, given))
        assert torch.equal(generated(fast, given, use_cache=False), generated(fast, given))


@pytest.mark.exhaustive  # traces the model once more
def test_a_plan_that_a_layer_cannot_hold_stays_on_paper(model, monkeypatch):
    monkeypatch.setattr(Workshop, "kernel_for", lambda self, site, brief=False: Sdpa())
    monkeypatch.setattr("attnopt.plan.live.converting.layer_attention", lambda site, *rest: Refusal("it is odd", site.name))
    step = PlanStep(
        "sinks-window", "site", "model.layers.0.self_attn", "", "", changes=("mask",), options={"sinks": 1, "window": 3}
    )
    fast = attnopt.optimize(model, plan=Plan("torch", "cpu", "torch", steps=(step,)), select="always")
    assert "the plan stays on paper" in str(fast.report) and "it is odd" in str(fast.report) and fast.plan.steps == ()
    assert torch.equal(generated(fast, tokens()), generated(model, tokens()))


def test_what_was_saved_with_layers_in_codes_computes_the_same(page):
    with torch.no_grad():
        assert torch.equal(page["again"](**tokens()).logits, page["small"](**tokens()).logits)
    assert page["again"].plan == page["small"].plan


def test_a_rewritten_graph_that_left_no_trace_in_the_modules_is_an_error():
    host = host_of("llama")
    made = host.copy()
    head = next(made.graph.of("linear"))
    made.set_input(head, head.inputs[1], head.inputs[1].load() * 2)
    made.finish()
    with pytest.raises(AccuracyError):
        compare(host, Rewritten(made, made), Live(host.model), tokens())


@pytest.mark.exhaustive  # a search of its own
def test_narrow_heads_are_found_under_a_budget_and_the_cache_shrinks(tmp_path):
    model = language_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for side in "kv":
                layer.self_attn.get_parameter(f"{side}_proj.weight").view(2, 16, 64)[:, 8:] *= 0.02
    given = {"budget": 1.0, "calibration": [tokens(32, 12)], "passes": ["eigen-attention", "int8-cache"]}
    fast = attnopt.optimize(model, **given, minimise="memory", select="model")
    how = "keys of 8 and values of 8 channels, of 16, keys lifted and turned whenever they are read"
    assert f"live, cache: {how}, in 2 layers" in str(fast.report)
    token = 2 * 2 * (8 + 8 + 2 * 8)  # layers, heads, codes, steps and zero points
    assert bytes_per_token(fast(**tokens()).past_key_values) == token
    fast.save_pretrained(tmp_path)
    assert torch.equal(generated(attnopt.load(tmp_path), tokens(padded=3)), generated(fast, tokens(padded=3)))


def test_example_inputs_give_a_traced_model(model):
    fast = attnopt.optimize(model, {**tokens(), "use_cache": False}, select="always", passes=["fuse-attention"])
    assert isinstance(fast, attnopt.Optimized)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"budget": 0.1}, BudgetError, r"needs data.*calibration=texts"),
        ({"budget": 0.1, "calibration": ["some text"]}, InputMismatch, r"no tokenizer.*tokenizer=tok"),
        ({"budget": 0.1, "calibration": 3}, InputMismatch, r"no list of texts"),
        (
            {"budget": 0.1, "calibration": [{"ids": torch.ones(2, 3)}]},
            InputMismatch,
            r"no input_ids \[B, L\] \(calibration batch 0",
        ),
        ({"budget": 0.1, "calibration": []}, InputMismatch, r"empty"),
        ({"host": "life"}, UnsupportedFormat, r"neither of module and graph"),
    ],
)
def test_what_is_asked_wrongly_says_what_to_do(model, options, error, says):
    with pytest.raises(error, match=says):
        attnopt.optimize(model, **options)


def test_another_module_cannot_be_live():
    with pytest.raises(UnsupportedFormat, match=r"no transformers model that generates.*example_inputs"):
        attnopt.optimize(torch.nn.Linear(2, 2), host="module")


def test_a_folder_of_something_else_is_named(tmp_path):
    with pytest.raises(UnreadableModel, match="no model that attnopt saved"):
        attnopt.load(tmp_path)
    (tmp_path / "attnopt.json").write_text('{"version": 99}')
    with pytest.raises(UnreadableModel, match="newer attnopt"):
        attnopt.load(tmp_path)


def test_texts_of_one_length_are_read_together_and_none_is_padded():
    def tokenizer(text):
        return {"input_ids": list(range(len(text)))}

    batches = token_batches(["a" * 300, "b" * 400, "cc", "d"], tokenizer)
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 256), (1, 2)]
    assert all(bool(b["attention_mask"].all()) for b in batches)
