"""The training examples run from end to end in seconds, with tiny settings, and what they write can be loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import train_recall
import train_reference_lm
import training
from tokenizers import Tokenizer

TINY = ["--size", "tiny", "--vocabulary", "300", "--length", "64", "--batch", "2", "--device", "cpu"]


@pytest.fixture
def sources(tmp_path):
    """A folder of 300 files that differ."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for i in range(300):
        lines = [f"def f{i}_{j}(x):\n    return x + {i * j}\n" for j in range(20)]
        (folder / f"{i}.py").write_text("\n".join(lines))
    return folder


def test_recall(tmp_path, capsys):
    tiny = ["--hidden", "32", "--layers", "1", "--steps", "3", "--tokens", "512", "--longest", "64", "--device", "cpu"]
    train_recall.main(["--out", str(tmp_path / "made"), *tiny])
    assert "accuracy" in capsys.readouterr().out
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "made").eval()
    assert 0.0 <= train_recall.accuracy(model, 4, 16, count=4) < 0.5


def test_recall_batches_grow():
    shapes = [b.tokens.shape for b in train_recall.batches(40, 2048, torch.device("cpu"))]
    assert shapes[0] == (2048 // 96, 96)
    assert max(s[1] for s in shapes[-6:]) == 1024 + 128
    assert all(s[0] * s[1] <= 2048 for s in shapes)


def test_reference_lm(tmp_path, sources, capsys):
    tiny = [*TINY, "--folder", str(sources)]
    train_reference_lm.main(["--out", str(tmp_path / "made"), "--steps", "5", *tiny])
    assert "nats per byte" in capsys.readouterr().out
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "made")
    tokenizer = Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json"))
    assert (model.dtype, model.config.num_key_value_heads, model.config.max_position_embeddings) == (torch.float16, 1, 4096)
    assert tokenizer.decode(tokenizer.encode("def f(x):\n    return x\n").ids) == "def f(x):\n    return x\n"
    assert tokenizer.token_to_id(train_reference_lm.BOUNDARY) == 0
    assert (tmp_path / "made" / "eval_tokens.npy").exists()
    before = (tmp_path / "made" / "model.safetensors").read_bytes()
    worse = ["--out", str(tmp_path / "made"), "--steps", "0", *tiny, "--present", str(tmp_path / "made")]
    train_reference_lm.main(worse)
    assert "not better: nothing is written" in capsys.readouterr().out
    assert (tmp_path / "made" / "model.safetensors").read_bytes() == before


def test_files_are_held_out_by_their_contents(sources):
    (sources / "copy.py").write_text((sources / "1.py").read_text())
    (sources / "short.py").write_text("x = 1\n")
    (sources / "latin.py").write_bytes(b"# \xe9" * 400)
    training_files, held_out = train_reference_lm.documents([sources])
    assert len(training_files) + len(held_out) == 300
    assert 0 < len(held_out) < 20
    assert not set(training_files) & set(held_out)
    (sources / "0.py").unlink()
    assert set(train_reference_lm.documents([sources])[1]) <= set(held_out)  # other files stay where they are


def test_without_files(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_reference_lm.main(["--out", str(tmp_path / "made"), *TINY, "--folder", str(tmp_path)])
    assert "none is held out" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "parameters"), [("full", 11_800_000), ("small", 5_800_000)])
def test_sizes(name, parameters):
    with torch.device("meta"):
        model = train_reference_lm.model_of(train_reference_lm.SIZES[name], 4096)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(parameters, rel=0.01)
    assert count * 2 <= train_reference_lm.LARGEST
    config = model.config
    assert (config.head_dim, config.num_hidden_layers, config.max_position_embeddings) == (64, 8, 4096)
    assert config.num_key_value_heads < config.num_attention_heads


def test_weights_that_are_too_large(monkeypatch, tmp_path):
    monkeypatch.setattr(train_reference_lm, "LARGEST", 1000)
    with pytest.raises(ValueError, match="more than 0"):
        train_reference_lm.write(tmp_path, train_reference_lm.model_of(train_reference_lm.SIZES["tiny"], 300), None, None)
    assert list(tmp_path.iterdir()) == []


def test_the_loop():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 1), torch.randn(64, 4)
    target = x.sum(1, keepdim=True)

    def endless():
        while True:
            yield x

    losses = training.train(layer, endless(), lambda m, b: (m(b) - target).square().mean(), steps=60, peak=0.1, decay=0.0)
    assert len(losses) == 60
    assert losses[-1] < 0.05 * losses[0]
    assert training.rate(0.0, 1.0) == 0.0
    assert training.rate(training.WARM_UP, 1.0) == 1.0
    assert training.rate(1.0, 1.0) == pytest.approx(0.0)
    short = training.train(layer, endless(), lambda m, b: (m(b) - target).square().mean(), minutes=0.002)
    assert len(short) > 1
    with pytest.raises(ValueError, match="not both"):
        training.train(layer, endless(), lambda m, b: m(b).sum())
