"""Whatever a user gives becomes a host with named inputs, and calibration data that are checked against them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hosts.onnx import small_models
from self_attention import SelfAttention, example
from torch import nn

from attnopt.errors import InputMismatch, UnreadableModel, UnsupportedFormat
from attnopt.opening import is_onnx, open_model

SHAPE = ("batch", 4, "length", 8)


def opened(model, example_inputs=None, need_inputs=False):
    return open_model(model, example_inputs, dynamic_shapes=None, need_inputs=need_inputs)


def test_torch():
    given = opened(SelfAttention().eval(), example())
    assert (given.host.kind, given.runtime, given.opset, given.output_name) == ("torch", "torch", 0, "hidden")
    assert {name: tuple(x.shape) for name, x in given.inputs.items()} == {"x": (2, 6, 64), "seen": (2, 6)}
    assert sorted(given.symbols().values()) == [2, 6]


def test_onnx():
    arrays = {name: np.zeros((3, 4, 5, 8), np.float32) for name in "qkv"}
    given = opened(small_models.spelled_out(), arrays)
    assert (given.host.kind, given.runtime, given.opset, given.output_name) == ("onnx", "onnxruntime", 17, "y")
    assert given.symbols() == {"batch": 3, "length": 5}
    assert all(isinstance(x, torch.Tensor) for x in given.inputs.values())
    made = opened(small_models.spelled_out())  # inputs that the model's own shapes tell
    assert made.symbols() == {"batch": 2, "length": 16}


def test_which_host(tmp_path):
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    assert [is_onnx(m) for m in (nn.Linear(2, 2), program, program.module(), small_models.spelled_out())] == [False] * 3 + [True]
    assert [is_onnx(p) for p in ("a.onnx", tmp_path / "a.pt2")] == [True, False]
    (tmp_path / "a.txt").write_text("text")
    for model, error, says in (
        (tmp_path / "a.txt", UnsupportedFormat, "'a.txt' is neither .onnx nor .pt2"),
        (tmp_path / "b.txt", UnreadableModel, "there is no file"),
        ([], UnsupportedFormat, "a list is not a model"),
        (None, UnsupportedFormat, "a NoneType is not a model"),
    ):
        with pytest.raises(error, match=says):
            is_onnx(model)


def test_calibration_in_samples():
    given = opened(small_models.spelled_out())
    one, two = ({name: torch.randn(2, 4, length, 8) for name in "qkv"} for length in (3, 4))
    assert given.batches(None) == []
    assert [b["q"].shape[2] for b in given.batches([one, tuple(two.values())])] == [3, 4]
    assert given.calibration([one, two]).samples == 4
    assert given.calibration(None).samples == 2  # the example inputs
    with pytest.raises(InputMismatch, match="input 'v' is missing") as raised:
        given.batches([one, {"q": one["q"], "k": one["k"]}])
    assert raised.value.where == "calibration batch 1"
