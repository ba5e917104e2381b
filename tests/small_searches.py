"""A model of a few linear layers, and what a search on it is given."""

from __future__ import annotations

import numpy as np
import torch
from hosts.onnx import small_models
from onnx import helper

from attnopt.analysis.calibration import Calibration
from attnopt.cost.target import load_target
from attnopt.hosts.onnx import OnnxHost
from attnopt.plan.budgeted import Setting
from attnopt.plan.judge.budget import Budget
from attnopt.plan.search.effort import EFFORTS

WIDTH = 64


def layers(count=6) -> OnnxHost:
    """y = relu(… relu(x W0) …), each weight with a few columns that are much larger: int8 loses something."""
    random, nodes, weights = np.random.default_rng(0), [], {}
    for i in range(count):
        weights[f"w{i}"] = (random.standard_normal((WIDTH, WIDTH)) * random.lognormal(0, 1, (WIDTH, 1)) / 12).astype(np.float32)
        nodes.append(helper.make_node("MatMul", ["x" if i == 0 else f"r{i - 1}", f"w{i}"], [f"m{i}"], name=f"layer{i}"))
        nodes.append(helper.make_node("Relu", [f"m{i}"], [f"r{i}" if i < count - 1 else "y"], name=f"relu{i}"))
    return OnnxHost.from_model(small_models.model(nodes, [small_models.value("x", ["n", WIDTH])], ["y"], weights))


def setting(host, budget, passes, **changes) -> Setting:
    batches = [{"x": torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(i))} for i in range(8)]
    given = {
        "host": host, "current": host, "sites": (), "chosen": (), "passes": passes, "inputs": batches[0],
        "data": Calibration.of(host.graph, batches), "budget": Budget.of(budget), "target": load_target("cpu")[0],
        "runtime": "onnxruntime", "opset": getattr(host, "opset", 0), "select": "always", "effort": EFFORTS["low"],
    }  # fmt: skip
    return Setting(**given | changes)
