"""The demo runs, and what it prints about the models that it wrote is so."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attnopt
from attnopt.plan.search.effort import EFFORTS

EXAMPLE = Path(__file__).parents[2] / "examples" / "minilm.py"


@pytest.fixture(scope="module")
def minilm():
    spec = importlib.util.spec_from_file_location("minilm", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.exhaustive
def test_the_demo(minilm, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(EFFORTS, "low", replace(EFFORTS["low"], seconds=5.0))  # what is not measured is predicted
    monkeypatch.setattr(sys, "argv", ["minilm.py", "--folder", str(tmp_path / "demo")])
    minilm.main()
    printed = capsys.readouterr().out
    names = ["minilm-budget-0.01.onnx", "minilm-exact.onnx", "minilm.onnx"]
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == names
    assert "6 attentions found" in printed
    rows = dict(re.findall(r"^(original|exact|budget 0\.01) +[\d.]+ ms +[\d.]+x +(\d\.\d{6}) +\d+$", printed, re.MULTILINE))
    assert list(rows) == ["original", "exact", "budget 0.01"]

    judged = minilm.tokens(minilm.SENTENCES)
    with torch.no_grad():
        wanted = minilm.SentenceEncoder()(**judged)
    for name, file in (("original", names[2]), ("exact", names[1]), ("budget 0.01", names[0])):
        loaded = attnopt.load(tmp_path / "demo" / file)
        cosine = torch.nn.functional.cosine_similarity(wanted, torch.from_numpy(loaded(judged)[0])).min()
        assert float(rows[name]) == pytest.approx(float(cosine), abs=2e-6)
        assert cosine > (0.97 if name == "budget 0.01" else 1 - 1e-5)
    report = loaded.report
    assert (report["budget"], len(report["sites"])) == (0.01, 6)
    assert all(r["loss"] <= 0.01 for r in report["rewrites"] if r["kept"])


def test_judged_and_calibration_sentences_are_apart(minilm):
    texts = minilm.calibration_texts(32)
    assert len(texts) == len(set(texts)) == 32
    assert set(texts).isdisjoint(minilm.SENTENCES)
