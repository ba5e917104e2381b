"""What was considered, as a table: options of groups that are alike in one row, why each lost, what the search used."""

from __future__ import annotations

from attnopt.report.plan import Plan, PlanStep
from attnopt.report.search import GroupReport, OptionReport, SearchReport, StepReport
from attnopt.report.search_table import plan_table, search_table
from attnopt.report.table import as_text


def option(kind, taken, why, **changes):
    given = {"predicted": 1e-3, "measured": 2e-3, "loss": 3e-4} | changes
    return OptionReport(kind, kind, taken, why, **given)


def search(**changes):
    groups = tuple(
        GroupReport(
            f"layer.{i}.mlp",
            (
                option("int8", False, "beaten by 'int8 smoothed'", estimated=True),
                option("int8 smoothed", True, "taken: saves 2 ms"),
            ),
            ("gate-norm: no attention",),
        )
        for i in range(3)
    )
    given = {
        "effort": "low", "seed": 0, "seconds": 12.0, "measurements": 40, "remembered": 3,
        "peak_memory": 2**30, "memory_limit": 2**32, "gap": 1e-3,
        "samples": (16, 18), "metric": "mean KL", "groups": groups,
        "steps": (StepReport("int8 smoothed", 3, True, "measured 1.50x", 3e-3, 2e-3, 1e-3),),
    }  # fmt: skip
    return SearchReport(**given | changes)


def test_groups_that_are_alike_are_one_row():
    text = as_text(search_table(search()), width=200)
    assert text.count("layer.{0-2}.mlp") == 1
    for part in ("* int8 smoothed", "0.0003 ?", "beaten by 'int8 smoothed'", "gate-norm: no attention", "measured 1.50x"):
        assert part in text
    assert "chosen by 16 samples, validated by 18 others; solver within 0.10% of the best" in text
    assert "40 measurements (3 read back), at most 1 GiB of 4 allowed" in text
    assert search().groups[0].taken == "int8 smoothed"


def test_without_data_and_without_a_search():
    assert "which judged it too" in as_text(search_table(search(samples=(4, 0), groups=(), steps=())), width=200)
    assert "no budget was given" in as_text(search_table(None))


def test_plans():
    steps = tuple(
        PlanStep("dynamic-int8", "linear", f"layer.{i}.mlp", "int8", "the linear layer in int8", "SmoothQuant") for i in range(2)
    )
    plan = Plan("onnx", "cpu", "onnxruntime", {"layer.0.attention": "ort-mha"}, steps, 0.01, "mean KL", 0.002, 0.003)
    text = as_text(plan_table(plan))
    for part in ("a plan for cpu, onnxruntime: 1 kernels, 2 rewrites", "kernel ort-mha", "layer.{0-1}.mlp", "SmoothQuant"):
        assert part in text
    assert "mean KL 0.002 (at most 0.003 with 95 % confidence), budget 0.01" in text


def test_steps_of_one_kind_name_their_groups():
    kept = StepReport("int8", 2, True, "measured 1.10x", 3e-3, 2e-3, 1e-3, ("a", "b"))
    undone = StepReport("int8", 1, False, "measured 0.90x: undone", 3e-3, 4e-3, None, ("c",))
    text = as_text(search_table(search(groups=(), steps=(kept, undone))), width=200)
    assert "int8 (a, b): measured 1.10x" in text and "int8 (c): measured 0.90x: undone" in text
    assert "int8 (2): measured 1.10x" in as_text(search_table(search(groups=(), steps=(kept,))), width=200)
