"""The pass that docs/passes.md builds is a pass: it proposes from evidence, is applied, measured and explained."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from attnopt.analysis.calibration import Calibration
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.site import Refusal
from attnopt.passes import FuseAttention
from attnopt.patterns import recognise
from attnopt.plan.judge.budget import Budget
from attnopt.plan.options.groups import Grouping
from attnopt.plan.pipeline import Request, run

PAGE = Path(__file__).parents[1] / "docs" / "passes.md"


@pytest.fixture(scope="module")
def recent_window(tmp_path_factory):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path_factory.mktemp("docs") / "recent_window.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("recent_window", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["recent_window"] = module
    spec.loader.exec_module(module)
    yield module.RecentWindow
    del sys.modules["recent_window"]


class Near(nn.Module):
    """Causal attention of 2 heads that looks mostly at near keys: scores fall with the distance."""

    def forward(self, x):
        q, k, v = x.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        place = torch.arange(x.shape[1])
        behind = place[:, None] - place[None, :]
        scores = (q @ k.mT * 0.1 - 0.2 * behind).masked_fill(behind < 0, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_the_pass_of_the_page(recent_window):
    x = torch.randn(1, 1024, 48)
    host = FxHost.from_captured(capture(Near(), (x,)))
    name = next(iter(host.example_inputs()))
    data = Calibration.of(host.graph, [{name: torch.randn(1, 1024, 48)} for _ in range(32)])
    asked = Request(
        "cpu", "torch", 0, "model", Budget.of(0.05), (FuseAttention(), recent_window(windows=(256, 64, 4))), {name: x}, data
    )
    result, report = run(host, asked)
    (site,), (group,) = report.sites, report.search.groups
    assert "causal & window(64)" in site.after
    assert site.steps[-1] == "recent-window"
    assert [o.kind for o in group.options] == ["recent-window: window 256", "recent-window: window 64"]  # 4 keys keep too little
    assert group.taken == "recent-window: window 64"
    assert 0 < report.search.loss <= report.search.bound <= 0.05
    wanted, got = host.runner()({name: x})[0], result.runner()({name: x})[0]
    assert 1e-7 < float((got - wanted).norm() / wanted.norm()) < 0.05


def test_its_refusals(recent_window):
    q = torch.randn(1, 2, 8, 8)

    class Open(nn.Module):
        def forward(self, q, k, v):
            return (q @ k.mT).softmax(-1) @ v

    host = FxHost.from_captured(capture(Open(), (q, q, q)))
    (group,) = Grouping(host, recognise(host.graph).sites).of("site")
    assert isinstance(recent_window().propose(group, None), Refusal)
