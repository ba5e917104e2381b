"""The command line of budgets, plans and frontiers."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnx
import pytest
from hosts.onnx import small_models
from onnx import helper

from attnopt.cli import main


@pytest.fixture
def attnopt(monkeypatch, capsys):
    """Run a command in this process; (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["attnopt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two layers of 64 x 64 around a relu, and 40 samples to calibrate on."""
    folder, random = tmp_path_factory.mktemp("plan"), np.random.default_rng(0)
    weights = {f"w{i}": (random.standard_normal((64, 64)) / 8).astype(np.float32) for i in range(2)}
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("MatMul", ["b", "w1"], ["y"], name="second"),
    ]
    onnx.save(small_models.model(nodes, [small_models.value("x", ["n", 64])], ["y"], weights), folder / "m.onnx")
    np.savez(folder / "data.npz", x=random.standard_normal((40, 64)).astype(np.float32))
    np.savez(folder / "few.npz", x=random.standard_normal((8, 64)).astype(np.float32))
    (folder / "score.py").write_text("def minus_error(inputs, outputs):\n    return -outputs['y'].abs().mean(-1)\n")
    return folder


def test_a_plan_is_written_shown_and_applied_again(attnopt, files, tmp_path):
    fast, again, plan = tmp_path / "fast.onnx", tmp_path / "again.onnx", tmp_path / "plan.json"
    given = (
        "--budget",
        "0.05",
        "--calibration",
        files / "data.npz",
        "--select",
        "always",
        "--explain",
        "--passes",
        "dynamic-int8",
    )
    code, out, err = attnopt("optimize", files / "m.onnx", "-o", fast, *given)
    assert (code, err) == (0, "")
    assert "dynamic-int8: kept, 2 of 2 groups" in out
    assert "chosen by 20 samples, validated by 20 others" in " ".join(out.split())
    code, out, _ = attnopt("plan", "show", fast)
    assert code == 0 and "0 kernels, 2 rewrites" in out and "first" in out and "second" in out
    _, out, _ = attnopt("plan", "show", fast, "--json")
    plan.write_text(out)
    assert attnopt("optimize", files / "m.onnx", "-o", again, "--plan", plan, "--select", "model")[0] == 0
    assert [n.op_type for n in onnx.load(again).graph.node] == [n.op_type for n in onnx.load(fast).graph.node]


def test_a_frontier_is_drawn(attnopt, files, tmp_path):
    page = tmp_path / "frontier.html"
    given = ("--calibration", files / "data.npz", "--effort", "low", "--passes", "dynamic-int8")
    code, out, err = attnopt("explore", files / "m.onnx", "-o", page, *given)
    assert (code, err) == (0, "")
    assert "m.onnx on cpu, loss in relative error" in out
    assert "exact" in out and "dynamic-int8: int8 everywhere" in out.replace("\n", " ")
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 2 and "exact" in text
    code, out, _ = attnopt("explore", files / "m.onnx", "-o", page, *given, "--json")
    points = json.loads(out)["points"]
    assert points[0]["loss"] == 0.0 and points[0]["plan"]["steps"] == []
    assert all(p["loss"] <= p["bound"] for p in points)
    everywhere = next(p for p in points if p["name"] == "dynamic-int8: int8 everywhere")
    assert everywhere["weights"] < 0.3 * points[0]["weights"]


def test_a_score_of_the_user(attnopt, files, tmp_path):
    given = (
        "--metric",
        "quality",
        "--drop",
        "0.01",
        "--quality",
        f"{files / 'score.py'}:minus_error",
        "--passes",
        "dynamic-int8",
        "--select",
        "always",
        "--json",
    )
    code, out, err = attnopt("optimize", files / "m.onnx", "-o", tmp_path / "f.onnx", "--calibration", files / "data.npz", *given)
    assert (code, err) == (0, "")
    search = json.loads(out)["search"]
    assert search["metric"] == "drop of quality" and abs(search["loss"]) < 0.01


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budget", "0.01", "--calibration", "few.npz"], "InputMismatch: calibration holds 8 samples"),
        (["--budget", "0.01", "--metric", "bleu"], "BudgetError: metric='bleu' is none of"),
        (["--drop", "0.01"], "BudgetError: a budget in quality needs a score"),
        (["--quality", "score.py:minus_error", "--budget", "0.1"], "BudgetError: a score is given, but the budget is in natural"),
        (["--quality", "score.py:other", "--drop", "0.1"], "BudgetError: 'score.py' has no function 'other'"),
        (["--quality", "absent.py:other", "--drop", "0.1"], "BudgetError: there is no score in 'absent.py:other'"),
        (["--minimise", "money"], "BudgetError: minimise='money' is neither of time and memory"),
        (["--effort", "great"], "BudgetError: effort='great' is none of low, medium, high"),
        (["--shapes", "prefil:4096"], "WorkloadError: 'prefil' is neither of prefill and decode"),
        (["--plan", "absent.json"], "PlanError: cannot read a plan from 'absent.json'"),
        (["--plan", "m.onnx"], "PlanError: there is no plan in 'm.onnx'"),
    ],
)
def test_mistakes_are_one_line(attnopt, files, tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(files)
    code, out, err = attnopt("optimize", "m.onnx", "-o", tmp_path / "fast.onnx", *options)
    assert (code, out) == (2, "")
    assert err.startswith(says) and err.count("\n") == 1
    assert not (tmp_path / "fast.onnx").exists()


def test_explore_refuses_before_the_work(attnopt, files, tmp_path):
    for output, budget, says in (
        ("f.png", "0.1", "UnsupportedFormat: cannot write '.png'"),
        ("f.html", "0", "BudgetError: a budget of 0"),
    ):
        code, out, err = attnopt("explore", files / "m.onnx", "-o", tmp_path / output, "--budget", budget)
        assert (code, out) == (2, "") and err.startswith(says)
