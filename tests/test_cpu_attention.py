"""The CPU benchmark on small shapes: every contender computes every case, and what is written has a row for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cpu.cases import MASKS, STORED, decodes, named, prefills
from cpu.goals import goals
from cpu.row import Row, beside_float32
from cpu.visits import Visit, seen, settings
from cpu_attention import table

from attnopt.codegen.tvm.availability import missing

ROOT = Path(__file__).parent.parent


@pytest.mark.exhaustive
@pytest.mark.skipif(missing() is not None, reason="TVM is not installed")
def test_every_code_path_on_small_shapes(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "cpu_attention.py", "--quick", "--out", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "cpu_attention.json").read_text())
    found = {row["setting"]: row for row in record["rows"]}
    assert found.keys() == {named(case) for case in (*prefills(True), *decodes(True))}
    for setting, row in found.items():
        peers = {"sdpa", "eager"} if setting.startswith("decode") else {"sdpa", "eager", "ort"}
        assert peers | {"attnopt"} <= row["seconds"].keys(), row
        assert row["error"] < 1e-4, row
    assert [visit["name"] for visit in record["visited"]] == [setting.name for setting in settings(256)]
    text = (tmp_path / "cpu_attention.md").read_text()
    assert "| causal 128 d64 x 4:1 |" in text
    assert "- full: at least 0.95 of the best peer: " in text


def test_the_cases():
    whole = [*prefills(False), *decodes(False)]
    assert {case.mask for case in whole if case.kind == "prefill"} == set(MASKS)
    assert {case.cache for case in whole if case.kind == "decode"} == set(STORED)
    assert {case.q_len for case in prefills(False)} == {128, 512, 2048, 8192}
    assert len({named(case) for case in whole}) == len(whole)


def test_packed_caches_stand_beside_float32():
    plain = Row("decode float32 512 d128 x 8", 1.0, {"sdpa": 3.0, "attnopt": 2.0}, 0.0)
    packed = Row("decode int8 512 d128 x 8", 1.0, {"attnopt": 1.0}, 0.0)
    _, made = beside_float32([plain, packed])
    assert made.seconds == {"sdpa": 3.0, "attnopt float32": 2.0, "attnopt": 1.0}
    assert made.over() == 3.0
    assert "| decode int8 512 d128 x 8 | 1 | 3e+03 | 1e+03 | 2e+03 | 3.00x | 3.00x | 0e+00 |" in table([plain, made])


def test_goals_say_whether_they_are_reached():
    rows = [
        Row("full 512 d64 x 8", 1.0, {"sdpa": 1.0, "ort": 0.9, "attnopt": 0.95}, 0.0),
        Row("full 2048 d64 x 4", 1.0, {"sdpa": 1.0, "attnopt": 1.0}, 0.0),
        Row("causal 512 d64 x 8", 1.0, {"sdpa": 1.2, "attnopt": 1.0}, 0.0),
        Row("decode int8 512 d128 x 8", 1.0, {"sdpa": 9.0, "attnopt float32": 2.0, "attnopt": 1.0}, 0.0),
    ]
    said = [str(goal) for goal in goals(rows, [Visit("full", 1.0, 1.0, 1.0), Visit("causal", 0.5, 0.5, 1.25)])]
    assert said == [
        "full: at least 0.95 of the best peer: not reached; in 1 of 2 settings, median 0.97, least 0.95 (full 512 d64 x 8)",
        "causal: at least 1.1 times the best peer: reached, 1.20 (causal 512 d64 x 8)",
        "window 512 of 8,192: at least 1.1 times FlexAttention: not measured",
        "window 512 of 8,192: at least 8 times SDPA with the mask: not measured",
        "one query: at least 1.8 times as fast from int8 as from float32: reached, 2.00 (decode int8 512 d128 x 8)",
        "time follows the visited blocks within 20%: not reached; in 1 of 2 settings, median 0.88, least 0.75 (causal)",
    ]


def test_visited_blocks():
    assert seen("causal & window(64)", 256, {}).sum() == 7
    found = {setting.name: setting for setting in settings(2048)}
    assert found["4 documents"].seen.sum() == 4 * 8 * 9 // 2
    assert not (found["list of 10%"].seen & ~found["causal"].seen).any()
