"""Blocks in what `inspect` prints and writes: one line for layers that are alike, and every part in the JSON."""

from __future__ import annotations

import json

import hf_models

import attnopt
from attnopt.report.table import as_text


def test_blocks_are_explained_and_written():
    model = hf_models.build("llama", layers=2)
    found = attnopt.inspect(model, hf_models.inputs("llama"))
    shown = " ".join(as_text(found.explain(), width=200).split())
    assert (
        "model.layers.{0-1}.self_attn rms_norm -> q 32x32, k 32x16, v 32x16; rotary 8 half base 10000; o 32x32; residual" in shown
    )
    record = json.loads(json.dumps(found.to_json()))
    block = record["sites"][1]["block"]
    assert block["text"] == str(found.sites[1].block)
    assert block["k"] == {
        "node": block["k"]["node"], "weight": "model_layers_1_self_attn_k_proj_weight", "bias": None, "in": 32, "out": 16,
        "stored": "out x in", "heads": 2, "width": 8, "channels": [0, 16], "shared": [],
    }  # fmt: skip
    assert (block["rotary"]["dims"], block["rotary"]["pairs"], block["rotary"]["on"]) == (8, "half", ["q", "k"])
    assert len(block["rotary"]["inv_freq"]) == 4
    assert (block["norm"]["kind"], block["residual"]["parallel"], block["missing"]) == ("rms", False, [])
    assert block["cache_k"] is None and block["q_norm"] is None
