"""The GPU benchmark without a GPU: every code path on tiny shapes in Triton's interpreter, its order, its counting, its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import gpu_attention
import pytest
import torch
from gpu.ahead import compile_one, families
from gpu.case import MASKS, ROUNDED, STORED, Case, cache_bytes, flops, make, pairs
from gpu.ceilings import Ceilings
from gpu.clock import in_turn
from gpu.goals import goal_lines
from gpu.measure import NOT_REACHED, Row, measured
from gpu.order import rows, small
from gpu.rates import ratio, share
from gpu.sdpa import NotSaid, mask_tensor
from gpu.table import as_text, cells, markdown

from attnopt.codegen.triton.ranking import written
from attnopt.codegen.triton.tiles import AMPERE
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.spec import parse

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TOP = Ceilings(800e12, 4000e9)
WINDOW = Case("prefill", "window", 128, 16384, 16384, 1, 16, 16)
DECODE = Case("decode", "full", 128, 1, 131072, 8, 32, 8)
TABLE = ROOT / "benchmarks" / "results" / "gpu_attention.md"


def run(*arguments, **environment):
    command = [sys.executable, ROOT / "benchmarks" / "gpu_attention.py", *arguments]
    given = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False)


def test_every_code_path_on_tiny_shapes(tmp_path):
    ended = run("--small", "--seed", "0", "--out", tmp_path, TRITON_INTERPRET="1")
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "gpu_attention.json").read_text())
    found = {(r["case"]["kind"], r["case"]["mask"], r["case"]["cache"], r["case"]["rounded"]): r for r in record["rows"]}
    assert {k[:2] for k in found if k[0] == "prefill"} == {("prefill", mask) for mask in MASKS}
    assert {k[3] for k in found if k[:2] == ("prefill", "causal")} == set(ROUNDED)
    for (kind, mask, cache, rounded), row in found.items():
        assert row["state"] == ""
        assert "attnopt" in row["seconds"] and row["error"] < 2e-2, row
        assert (row["cosine"] is None) == (not rounded) and (not rounded or row["cosine"] > 0.999), row
        if cache == "bf16" and not rounded:  # FlexAttention says all of them, and torch's flash all but soft caps
            assert {"flex", *(["flash"] if mask != "softcap" else [])} <= row["seconds"].keys(), (kind, row)
        assert ("attnopt masked" in row["seconds"]) == (mask == "documents")
    assert record["device"]["versions"].keys() >= {"attnopt", "torch", "triton"}
    assert (tmp_path / "gpu_attention.md").read_text().startswith("# Attention on a GPU")
    assert "prefill window d64 48 x 1" in ended.stdout


TILES = """
import sys
sys.path[:0] = ["benchmarks", "."]
import torch
from attnopt.codegen.triton import ranking
from gpu import tiles
tiles.SHAPES |= {"prefill": {"b": 1, "h": 2, "g": 1, "q": 40, "k": 40}, "decode": {"b": 1, "h": 2, "g": 1, "q": 1, "k": 70}}
found = {}
for question in list(tiles.questions("sm_80"))[::3]:  # prefill and decode, 64 channels
    found[question.measured_as] = tiles.measured(question, tiles.tried(question)[-2:], torch.device("cpu"))
print(tiles.as_toml(found))
"""


def test_tiles_are_timed_and_written_as_they_are_read():
    ended = subprocess.run(
        [sys.executable, "-c", TILES],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    tables = tomllib.loads(ended.stdout)
    assert list(tables) == ["sm_80 prefill 64 bfloat16", "sm_80 decode 64 bfloat16"]
    assert all(min(factors.values()) == 1.0 and len(factors) == 2 for factors in tables.values())
    assert {*tables["sm_80 prefill 64 bfloat16"]} == {written(tile) for tile in AMPERE[64][-2:]}


def test_kernels_are_compiled_ahead_from_tensors_that_hold_nothing():
    """For every family a form that the operators would ask for; one of them compiled."""
    found = families(rows())
    assert len(found) == 3 * len(MASKS) + len(STORED) + 2 * 2 * 2
    for case in found:
        assert make(case, torch.device("meta"), None).q.shape == (case.batch, case.heads, case.q_len, case.width)
    compile_one(next(c for c in found if c.mask == "softcap" and c.width == 64), "sm_80")


def test_politely_without_a_gpu():
    ended = run()
    assert (ended.returncode, ended.stdout) == (0, "nothing is measured: there is no GPU here\n")


def test_the_kept_table_has_every_row():
    text = TABLE.read_text(encoding="utf-8")
    assert all(f"| {case.name} |" in text for case in rows())
    if "no GPU has run this yet" in text:
        assert text == gpu_attention.empty()


def test_the_important_rows_come_first():
    cases = rows()
    assert len(set(cases)) == len(cases) == 3 * 4 * len(MASKS) + 3 * 3 * 2 * len(STORED) + 2 * 2 * 2 * 2
    assert {c.mask for c in cases[:6]} == set(MASKS)
    assert {(c.kind, c.width, c.kv_len) for c in cases[:6]} == {("prefill", 128, 16384)}
    assert [c.cache for c in cases[6:9]] == list(STORED)
    assert {(c.kind, c.kv_len) for c in cases[6:9]} == {("decode", 131072)}


@pytest.mark.parametrize("case", [c for c in small(rows()) if c.kind == "prefill"], ids=lambda c: c.mask)
def test_work_is_that_of_visible_pairs(case):
    data = make(case, CPU, torch.Generator())
    mask = parse(case.spec).mask
    grid = Grid(case.batch, 1, case.q_len, case.kv_len)
    visible = torch.ones(()) if mask is None else evaluate(mask, grid, data.operands)
    count = int(visible.expand(case.batch, 1, case.q_len, case.kv_len).sum())
    assert pairs(case, data) == count
    assert flops(case, data) == 4 * count * case.heads * case.width


def test_work_of_a_cache():
    cases = [Case("decode", "full", 128, 1, 64, 2, 32, 8, cache) for cache in STORED]
    tokens, found = 2 * 2 * 8 * 64, [cache_bytes(make(case, CPU, torch.Generator())) for case in cases]
    assert found == [tokens * 256, tokens * (128 + 4), tokens * (64 + 8)]


def test_masks_that_are_too_large_for_libraries_are_not_made():
    case = Case("prefill", "alibi", 64, 32768, 32768, 1, 32, 32)
    with pytest.raises(NotSaid, match="its mask takes 64 GiB"):
        mask_tensor(case, make(Case("prefill", "alibi", 64, 4, 4, 1, 32, 32), CPU, torch.Generator()))


def test_the_deadline():
    assert [row.state for row in measured(small(rows())[:3], CPU, time.monotonic() - 1)] == [NOT_REACHED] * 3


def test_the_clock_takes_turns():
    calls: list[str] = []
    seconds = in_turn({name: lambda name=name: calls.append(name) for name in "ab"})
    assert seconds.keys() == {"a", "b"}
    assert calls[:2] == ["a", "b"]


def test_rates_and_ratios():
    row = Row(WINDOW, {"flash": 0.004, "flex": 0.003, "attnopt": 0.002}, {"cudnn": "has no mask"}, 0.8e12, 0.004, 0.001)
    bf16 = Row(DECODE, {"flash": 0.004, "attnopt": 0.002}, {}, 4e9, 0.001, 0.001)
    int4 = Row(Case(**{**vars(DECODE), "cache": "int4"}), {"attnopt": 0.001}, {}, 1e9, 0.001)
    found = [row, bf16, int4]
    assert (ratio(row, found), ratio(row, found, "flex"), ratio(row, found, "cudnn")) == (1.5, 1.5, None)
    assert (share(row, TOP), share(bf16, TOP)) == (0.5, 0.5)
    assert ratio(int4, found) == 4.0
    assert cells(row, found, TOP) == [
        "prefill window d128 16k x 1", "400 TFLOP/s", "flex 267", "1.50x", "1.50x", "50%", "flash 200; flex 267; cudnn: has no mask",
        "4e-03",
    ]  # fmt: skip
    assert cells(int4, found, TOP)[1:4] == ["1000 GB/s", "flash on bf16 250", "4.00x"]
    narrow = Row(
        Case("prefill", "causal", 128, 16384, 16384, 1, 16, 16, rounded="int8 fp8"),
        {"attnopt": 0.001},
        {},
        0.8e12,
        0.004,
        cosine=0.9995,
    )
    whole = Row(replace(narrow.case, rounded=""), {"flash": 0.002, "attnopt": 0.0016}, {}, 0.8e12, 0.004)
    found += [narrow, whole]
    assert ratio(narrow, found) == 2.0
    assert cells(narrow, found, TOP)[2] == "flash on bf16 400" and cells(narrow, found, TOP)[-1] == "4e-03, cosine 0.99950"
    goals = {line[0]: line[2:] for line in goal_lines(found, TOP)}
    assert goals["causal d128 at 16k in int8 and fp8, times the best bf16 kernel"] == ["1.60", "reached"]
    assert goals["causal d128 at 16k in int8 and fp8, cosine to exact products"] == ["0.99950", "reached"]
    assert goals["window d128 at 16k, times FlexAttention"] == ["1.50", "reached"]
    assert goals["decode of int4 caches at 128k, times that of bf16"] == ["2.00", "not reached"]
    assert goals["alibi d128 at 16k, times FlexAttention"] == ["not measured", ""]
    left = Row(Case(**{**vars(WINDOW), "width": 256}), state=NOT_REACHED)
    assert as_text([*found, left], TOP).splitlines()[-1] == "not reached before the deadline (1): prefill window d256 16k x 1"
    assert "| prefill window d256 16k x 1 | not reached |" in markdown([*found, left], TOP, ["note"])


@pytest.mark.parametrize(
    ("error", "apart", "wrong"), [(0.01, 0.01, False), (0.1, 0.01, True), (0.01, float("nan"), True), (None, None, False)]
)
def test_wrong_results_are_called_wrong(error, apart, wrong):
    row = Row(WINDOW, {"attnopt": 1.0}, {}, 1e12, error, apart)
    assert row.wrong == wrong
    assert ("WRONG" in cells(row, [row], TOP)[1]) == wrong
