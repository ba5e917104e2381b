"""Prefill and decode as two graphs: named as runners know them, token for token what generate() says, also beside padding."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest
import torch
from hf_models import VOCABULARY, build

import attnopt
from attnopt.decoder import written
from attnopt.errors import InputMismatch, OutputNotWritable, UnsupportedFormat

SHORT, LONG = [5, 9, 2, 71], [8, 3, 60, 41, 11, 17, 29]


def example(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generated(model, texts, tokens):
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(t)) + t for t in texts])
    mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in texts])
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[
        :, longest:
    ].tolist()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["mistral", "llama", "gpt2"])
def test_two_onnx_graphs_generate_what_the_model_generates(family, tmp_path):
    model = build(family, "sdpa", layers=1)
    wanted = generated(model, [LONG, SHORT], 8)
    made = attnopt.export_decoder(model, tmp_path, select="always")
    assert [r.fused for r in made.reports] == [1, 1]
    graph = onnx.load(made.decode).graph
    assert [i.name for i in graph.input] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key", "past_key_values.0.value",
    ]  # fmt: skip
    assert [o.name for o in graph.output] == ["logits", "present.0.key", "present.0.value"]
    assert [d.dim_param or d.dim_value for d in graph.output[1].type.tensor_type.shape.dim][::2] == ["batch", "past + 1"]
    assert example("generate_onnx").Generator(tmp_path)([LONG, SHORT], 8) == wanted


@pytest.mark.exhaustive
def test_two_torch_graphs_do_the_same(tmp_path):
    model = build("llama", "sdpa", layers=1)
    wanted = generated(model, [LONG], 6)
    made = attnopt.export_decoder(model, tmp_path, format="pt2", select="always")
    prefill, decode = attnopt.load(made.prefill), attnopt.load(made.decode)
    ids = torch.tensor([LONG])
    mask = torch.ones_like(ids)
    logits, past = prefill(input_ids=ids, attention_mask=mask, position_ids=mask.cumsum(1) - 1)
    tokens = []
    for _ in range(6):
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
        mask = torch.cat([mask, mask[:, :1]], 1)
        logits, past = decode(
            input_ids=tokens[-1], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=past
        )
    assert torch.cat(tokens, 1).tolist() == wanted


def test_what_cannot_be_exported_so_is_told_before_anything_is_written(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(UnsupportedFormat, match="T5ForConditionalGeneration has an encoder beside its decoder"):
        attnopt.export_decoder(build("t5"), folder)
    with pytest.raises(UnsupportedFormat, match="BertModel is no decoder"):
        attnopt.export_decoder(build("bert"), folder)
    with pytest.raises(UnsupportedFormat, match="'gguf' is none of onnx, pt2"):
        attnopt.export_decoder(build("llama"), folder, format="gguf")
    ids = torch.randint(0, VOCABULARY, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    with pytest.raises(InputMismatch, match="padded on its right"):
        attnopt.export_decoder(build("llama"), folder, example_inputs={"input_ids": ids, "attention_mask": mask})
    with pytest.raises(InputMismatch, match="leaves no past"):
        attnopt.export_decoder(build("llama"), folder, example_inputs={"input_ids": ids[:, :2]})
    assert not folder.exists()


def test_where_one_graph_cannot_be_written_there_is_none(tmp_path):
    class Broken:
        def export(self, path):
            raise OutputNotWritable("the disk is full", next_move="Make room.")

    class Fine:
        def export(self, path):
            path.write_text("graph")
            return path

    (tmp_path / "prefill.onnx").write_text("of an earlier export")
    with pytest.raises(OutputNotWritable, match="the disk is full"):
        written(tmp_path, build("llama"), (Fine(), Broken()), "onnx")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("prefill.onnx", "of an earlier export")]
