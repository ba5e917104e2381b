"""The cost model's benchmark on a GPU, without one: a clock that tells what a model with other shares predicts."""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import cost_model_gpu
import ship_efficiencies
from gpu.case import make
from gpu.cost_points import DTYPE, cases, of_fit, on_gpu, points, prepared, shape_of
from gpu.order import rows, small
from gpu.peers import GpuLost

from attnopt.cost.efficiency import Efficiency
from attnopt.cost.estimate import estimate
from attnopt.cost.target import load_target

H200 = load_target("h200")[0]
TRUE = replace(H200, efficiencies={"sdpa": Efficiency(0.8, 0.4, 0.9), "triton": Efficiency(0.3, 0.4, 0.6, ramp=1.0)})
CPU = torch.device("cpu")


def told(case, names, device):
    return {k: estimate(case.spec, shape_of(case), DTYPE, k, target=TRUE).seconds for k in names}, {}


def test_the_fit_finds_the_shares_that_the_clock_has(tmp_path, capsys):
    cost_model_gpu.run("h200", 60.0, timer=told, device=CPU, out=tmp_path)
    record = json.loads((tmp_path / "cost_model_h200.json").read_text())
    fitted, shipped = (record[name]["summary"] for name in ("fitted on the other cases", "as shipped"))
    assert fitted["points"] == shipped["points"] >= 120
    assert fitted["median_error"] < 0.03 < shipped["median_error"]
    assert fitted["tau"] > 0.97
    text = (tmp_path / "cost_model_h200.md").read_text()
    assert "| triton-prefill |" in text and "| triton-decode |" in text and "Shares as shipped:" in text
    target = tomllib.loads((tmp_path / "cost_model_h200.toml").read_text())
    assert target["efficiencies"]["sdpa"]["products"] == pytest.approx(0.8, rel=0.05)
    merged = tomllib.loads(ship_efficiencies.merged(ship_efficiencies.SHIPPED.read_text(encoding="utf-8"), target))
    assert merged["gpu"]["triton"]["products"] == pytest.approx(target["efficiencies"]["triton"]["products"], rel=0.01)


def test_points_are_many_and_what_no_kernel_says_is_left_out():
    found = dict(points(cases()))
    assert sum(len(names) for case, names in found.items()) >= 300
    assert {of_fit(case, 3) for case in found} == {True, False}
    for case, names in found.items():
        assert case.mask != "documents" and names[0] == f"triton-{case.kind}"
        assert ("sdpa" in names) == (case.cache == "bf16" and not case.rounded and case.mask != "softcap")


def test_torch_kernels_compute_the_case():
    for case in small(rows()):
        names = dict(points([case])).get(case, ())[1:]
        data = make(case, CPU, torch.Generator().manual_seed(0), torch.float32)
        results = [prepared(name, case, data)() for name in names]
        assert all(torch.allclose(results[0], other, atol=1e-5) for other in results[1:])


def test_what_fails_is_told_and_the_deadline_is_kept():
    case = next(c for c in small(rows()) if c.mask == "softcap")
    seconds, reasons = on_gpu(case, ["eager", "sdpa"], CPU)
    assert [*seconds] == ["eager"] and reasons == {"sdpa": "has no soft cap"}
    late = cost_model_gpu.measure(cases(), CPU, 0.0, told)
    assert late.seconds == {} and late.notes[0].startswith("not reached (")

    def lost(case, names, device):
        raise GpuLost("gone")

    stopped = cost_model_gpu.measure(cases(), CPU, float("inf"), lost)
    assert stopped.seconds == {} and "the GPU stopped at prefill causal" in stopped.notes[0]


def test_without_a_gpu_nothing_is_measured(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    cost_model_gpu.run("h200", 1.0)
    assert capsys.readouterr().out.startswith("nothing is measured: ")
    with pytest.raises(SystemExit, match="no GPU"):
        cost_model_gpu.run("cpu", 1.0)
