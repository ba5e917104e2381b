"""Codes of every width, grid and group that an exported layer may hold, by onnxruntime's operators."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from hosts.onnx import small_models
from onnx import helper

from attnopt.errors import UnsupportedFormat
from attnopt.hosts.onnx.execution import runner
from attnopt.hosts.onnx.exported_codes import store_codes
from attnopt.rounding.bit_packing import packed
from attnopt.runtime.rounded_linear import rounded_linear, rounded_rows

OUT, IN = 8, 64


def arrays(bits: int, group: int, zeros: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    groups = IN // (group or IN)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 2**bits, shape, generator=random, dtype=torch.uint8)

    made = {"codes": packed(codes(OUT, IN), bits), "steps": torch.rand(OUT, groups, generator=random)}
    return made | ({"zeros": codes(OUT, groups)} if zeros else {})


def stored(op: str, given: str, kind: int, held: dict[str, torch.Tensor], bits: int, middle: float) -> ir.Model:
    inputs = [given, "codes", "steps", "zeros" if "zeros" in held else "", *(["bias"] if "bias" in held else [])]
    node = helper.make_node(op, inputs, ["y"], name="layer", domain="attnopt", bits=bits, middle=middle, channels=IN)
    shape = ["n", IN] if kind == small_models.FLOAT else ["n"]
    proto = small_models.model(
        [node], [small_models.value(given, shape, kind)], ["y"], {n: x.numpy() for n, x in held.items()}, 18
    )
    proto.opset_import.append(helper.make_opsetid("attnopt", 1))
    model = ir.from_proto(proto)
    store_codes(model)
    return model


@pytest.mark.parametrize(
    ("bits", "group", "zeros", "middle"),
    [(4, 32, True, 8.0), (4, 16, False, 7.5), (3, 0, False, 4.0), (2, 16, False, 2.0), (8, 0, False, 128.0)],
)
def test_layers_compute_what_the_operator_of_torch_does(bits, group, zeros, middle):
    held = arrays(bits, group, zeros) | {"bias": torch.arange(OUT) / 3}
    model = stored("rounded_linear", "x", small_models.FLOAT, held, bits, middle)
    assert {n.op_type for n in model.graph} >= {"MatMulNBits", "Add"} and "attnopt" not in model.opset_imports
    assert not {"codes", "steps"} & set(model.graph.initializers)
    x = torch.randn(5, IN, generator=torch.Generator().manual_seed(1))
    wanted = rounded_linear(x, held["codes"], held["steps"], held.get("zeros"), held["bias"], bits, middle)
    torch.testing.assert_close(runner(model)({"x": x})[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "group", "zeros"), [(4, 32, True), (8, 16, False)])
def test_tables_look_up_what_the_operator_of_torch_does(bits, group, zeros):
    held, ids = arrays(bits, group, zeros), torch.tensor([3, 0, 7])
    model = stored("rounded_rows", "ids", small_models.INT64, held, bits, 2.0 ** (bits - 1))
    wanted = rounded_rows(ids, held["codes"], held["steps"], held.get("zeros"), bits, 2.0 ** (bits - 1), IN)
    torch.testing.assert_close(runner(model)({"ids": ids})[0], wanted)


def test_groups_that_onnxruntime_cannot_hold_are_an_error():
    with pytest.raises(UnsupportedFormat, match=r"'int4 group 8': blocks of 8.*optimise the original for ONNX"):
        stored("rounded_linear", "x", small_models.FLOAT, arrays(4, 8, False), 4, 8.0)


def test_a_model_without_codes_stays_as_it_is():
    model = ir.from_proto(small_models.spelled_out())
    before = ir.to_proto(model).SerializeToString()
    store_codes(model)
    assert ir.to_proto(model).SerializeToString() == before
