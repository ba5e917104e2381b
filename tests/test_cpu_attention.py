"""The CPU benchmark on small shapes: every contender computes every case, and what is written has a row for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cpu.cases import MASKS, STORED, decodes, named, prefills, windows
from cpu_attention import Row, beside_float32, table

from attnopt.codegen.tvm.availability import missing

ROOT = Path(__file__).parent.parent


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
    assert len(record["visited"]) == len(list(windows(True)))
    assert "| causal 128 d64 x 4:1 |" in (tmp_path / "cpu_attention.md").read_text()


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
