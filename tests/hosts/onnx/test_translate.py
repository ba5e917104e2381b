"""Every canonical node means what its ONNX operators compute, on whole exports and on single operators."""

from __future__ import annotations

import hf_models
import numpy as np
import onnx
import pytest
import torch
from canonical import check, values_in_host
from hosts.onnx import small_models
from onnx import TensorProto, helper
from onnx_exports import CASES, export, tensors

from attnopt.hosts.onnx import OnnxHost

UNREAD = {"Div", "NonZero", "ScatterND", "ReduceProd", "If", "Size"}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("family", "attention", "exporter"), CASES)
def test_exports_mean_the_same_node_by_node(family, attention, exporter):
    host = OnnxHost.from_model(export(family, attention, exporter))
    named = tensors(hf_models.inputs(family))
    values = [*host.graph.inputs, *values_in_host(host.graph)]
    compared = check(host.graph, dict(zip(values, host.tap(values, named), strict=True)))
    assert compared > 60
    assert {n.attrs["operator"] for n in host.graph.of("opaque")} <= UNREAD


def model_of(
    op_type: str, inputs: list[np.ndarray], constants: dict[int, np.ndarray], outputs: int = 1, opset: int = 21, **attrs
):
    """A model of one operator; inputs with an index in `constants` are initializers."""
    names = [f"x{i}" for i in range(len(inputs) + len(constants))]
    given = iter(inputs)
    infos, initializers = [], []
    for i, name in enumerate(names):
        array = constants.get(i)
        if array is None:
            array = next(given)
            infos.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), list(array.shape)))
        else:
            initializers.append(onnx.numpy_helper.from_array(array, name))
    made = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op_type, names, made, name="it", **attrs)
    outs = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in made]
    graph = helper.make_graph([node], "one", infos, outs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def f(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def i(*numbers):
    return np.array(numbers, dtype=np.int64)


OPERATORS = {
    "einsum_scores": ("Einsum", [f(2, 3, 4, 5), f(2, 3, 6, 5)], {}, {"equation": "bhqd,bhkd->bhqk"}),
    "einsum_heads_last": ("Einsum", [f(2, 4, 3, 5), f(2, 6, 3, 5)], {}, {"equation": "bqhd,bkhd->bhqk"}),
    "einsum_permuted_result": ("Einsum", [f(2, 3, 4, 5), f(2, 6, 5)], {}, {"equation": "bhqd,bkd->kqhb"}),
    "gemm": ("Gemm", [f(4, 5)], {1: f(6, 5), 2: f(6)}, {"transB": 1}),
    "gemm_scaled": ("Gemm", [f(4, 5), f(5, 6), f(4, 6)], {}, {"alpha": 0.5, "beta": 2.0}),
    "gemm_without_shift": ("Gemm", [f(4, 5), f(5, 6)], {}, {"alpha": 3.0}),
    "unsqueeze": ("Unsqueeze", [f(2, 3)], {1: i(0, -1)}, {}),
    "squeeze": ("Squeeze", [f(2, 1, 3)], {1: i(1)}, {}),
    "flatten": ("Flatten", [f(2, 3, 4)], {}, {"axis": 2}),
    "reshape_zero_and_rest": ("Reshape", [f(2, 3, 8)], {1: i(0, -1, 4)}, {}),
    "expand": ("Expand", [f(3, 1)], {1: i(2, 1, 4)}, {}),
    "tile": ("Tile", [f(2, 3)], {1: i(1, 2)}, {}),
    "tile_as_expand": ("Tile", [f(2, 1)], {1: i(1, 5)}, {}),
    "slice": ("Slice", [f(2, 6)], {1: i(1), 2: i(5), 3: i(1), 4: i(2)}, {}),
    "slice_from_the_end": ("Slice", [f(2, 6)], {1: i(-2), 2: i(1 << 40), 3: i(1)}, {}),
    "gather": ("Gather", [f(5, 3)], {1: np.array([[0, 4], [2, 1]])}, {}),
    "gather_one": ("Gather", [f(5, 3)], {1: np.array(-1)}, {"axis": 1}),
    "scatter_rows": ("ScatterND", [f(5, 3), f(2, 3)], {1: np.array([[1], [4]])}, {}),
    "slice_two_axes": ("Slice", [f(4, 6, 5)], {1: i(1, -3), 2: i(4, -1), 3: i(0, 2), 4: i(2, 1)}, {}),
    "slice_first_axes": ("Slice", [f(4, 6)], {1: i(1, 0), 2: i(3, 9)}, {}),
    "gather_nd": ("GatherND", [f(4, 5, 3)], {1: np.array([[[0, 4], [3, -1]], [[1, 2], [0, 0]]])}, {}),
    "gather_nd_one_axis": ("GatherND", [f(4, 5)], {1: i(3, 0)[:, None]}, {}),
    "gather_nd_batch": ("GatherND", [f(2, 5, 3)], {1: np.array([[[4], [0]], [[2], [2]]])}, {"batch_dims": 1}),
    "gather_elements": ("GatherElements", [f(3, 4)], {1: np.array([[0, 3, 1], [2, 2, 0], [1, -1, 3]])}, {"axis": 1}),
    "reduce_l2": ("ReduceL2", [f(2, 3)], {1: i(1)}, {}),
    "reduce_l1": ("ReduceL1", [f(2, 3)], {}, {"keepdims": 0}),
    "reduce_sum_square": ("ReduceSumSquare", [f(2, 3)], {1: i(0)}, {}),
    "reduce_log_sum_exp": ("ReduceLogSumExp", [f(2, 3)], {1: i(-1)}, {}),
    "softplus": ("Softplus", [f(2, 5) * 40], {}, {}),
    "sign": ("Sign", [np.array([[-2.0, 0.0, 3.0]], np.float32)], {}, {}),
    "ceil": ("Ceil", [f(2, 5)], {}, {}),
    "log_softmax": ("LogSoftmax", [f(2, 5)], {}, {}),
    "max_of_three": ("Max", [f(2, 3), f(1, 3), f(3)], {}, {}),
    "sum_of_three": ("Sum", [f(2, 3), f(2, 3), f(3)], {}, {}),
    "mean": ("Mean", [f(2, 3), f(2, 1)], {}, {}),
    "pad": ("Pad", [f(2, 3)], {1: i(0, 1, 2, 0), 2: np.float32(7.0)}, {}),
    "pad_one_axis": ("Pad", [f(2, 3)], {1: i(1, 2), 2: np.float32(0.0), 3: i(-1)}, {}),
    "depth_to_space": ("DepthToSpace", [f(2, 8, 3, 5)], {}, {"blocksize": 2}),
    "depth_to_space_columns": ("DepthToSpace", [f(2, 8, 3, 5)], {}, {"blocksize": 2, "mode": "CRD"}),
    "space_to_depth": ("SpaceToDepth", [f(2, 3, 4, 6)], {}, {"blocksize": 2}),
    "einsum_outer": ("Einsum", [f(2, 3), f(4)], {}, {"equation": "bq,k->bqk"}),
    "einsum_summed_alone": ("Einsum", [f(2, 3, 4), f(2, 5, 4)], {}, {"equation": "bqd,bkd->bq"}),
    "einsum_ellipsis": ("Einsum", [f(2, 3, 4, 5), f(2, 3, 6, 5)], {}, {"equation": "...qd,...kd->...qk"}),
    "einsum_implicit": ("Einsum", [f(3, 4), f(4, 5)], {}, {"equation": "ab,bc"}),
    "einsum_one": ("Einsum", [f(2, 3, 4)], {}, {"equation": "bqd->dq"}),
    "reduce_mean": ("ReduceMean", [f(2, 3, 4)], {1: i(-1)}, {}),
    "reduce_all": ("ReduceMax", [f(2, 3)], {}, {"keepdims": 0}),
    "clip": ("Clip", [f(2, 3)], {1: np.float32(-0.5), 2: np.float32(0.5)}, {}),
    "where": ("Where", [f(2, 3) > 0, f(2, 3), f(3)], {}, {}),
    "trilu": ("Trilu", [f(3, 3)], {1: np.array(1)}, {"upper": 1}),
    "range": ("Range", [], {0: np.array(2), 1: np.array(9), 2: np.array(1)}, {}),
    "cumsum": ("CumSum", [f(2, 3)], {1: np.array(1)}, {}),
    "layer_norm": ("LayerNormalization", [f(2, 5)], {1: f(5), 2: f(5)}, {"epsilon": 1e-4}),
    "gelu": ("Gelu", [f(2, 5)], {}, {"approximate": "tanh"}),
    "cast": ("Cast", [f(2, 5)], {}, {"to": int(TensorProto.INT64)}),
    "softmax": ("Softmax", [f(2, 5)], {}, {"axis": 0}),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name):
    op_type, inputs, constants, attrs = OPERATORS[name]
    host = OnnxHost.from_model(model_of(op_type, inputs, constants, **attrs))
    assert not list(host.graph.of("opaque"))
    named = dict(zip([v.name for v in host.graph.inputs], map(torch.from_numpy, inputs), strict=True))
    values = [*host.graph.inputs, *values_in_host(host.graph)]
    assert check(host.graph, dict(zip(values, host.tap(values, named), strict=True))) == 1


@pytest.mark.parametrize("flat", [False, True])
def test_attention_operator(flat):
    shapes = [(2, 5, 24), (2, 7, 12), (2, 7, 16)] if flat else [(2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 7, 8)]
    heads = {"q_num_heads": 4, "kv_num_heads": 2} if flat else {}
    inputs = [f(*s) for s in shapes]
    host = OnnxHost.from_model(model_of("Attention", inputs, {}, opset=23, softcap=20.0, **heads))
    named = dict(zip([v.name for v in host.graph.inputs], map(torch.from_numpy, inputs), strict=True))
    values = [*host.graph.inputs, *values_in_host(host.graph)]
    assert check(host.graph, dict(zip(values, host.tap(values, named), strict=True))) == 1


def test_split_gives_slices():
    model = model_of("Split", [f(2, 6)], {}, outputs=3, axis=1, num_outputs=3)
    host = OnnxHost.from_model(model)
    assert [(n.attrs["start"], n.attrs["stop"]) for n in host.graph.of("slice")] == [(0, 2), (2, 4), (4, 6)]


def test_integer_division_is_not_taken_for_true_division():
    host = OnnxHost.from_model(model_of("Div", [i(7, 8)], {1: i(2, 3)}))
    assert [n.op for n in host.graph.nodes] == ["opaque"]


def test_symbols_that_must_be_equal_share_a_name():
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch_1", "length"])
    node = helper.make_node("Add", ["x", "y"], ["z"], name="add")
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, [None, None])
    model = helper.make_model(
        helper.make_graph([node], "g", [x, y], [out]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    graph = OnnxHost.from_model(model).graph
    assert graph.inputs[0].shape == graph.inputs[1].shape == graph.nodes[0].output.shape


def test_module_and_line():
    host = OnnxHost.from_model(export("bert", "eager", "dynamo"))
    node = next(host.graph.of("softmax"))
    assert node.source.module == "encoder.layer.0.attention.self"
    assert node.source.line.startswith("modeling_bert.py:")
    host = OnnxHost.from_model(export("bert", "eager", "torchscript"))
    assert next(host.graph.of("softmax")).source.module == "model.encoder.layer.0.attention.self"


@pytest.mark.parametrize("mask_first", [False, True])
def test_a_sum_names_what_must_be_equal_to_it(mask_first):
    """past + new keys meet a mask of `total` columns, in either order, and translation ends."""
    nodes = [
        helper.make_node("Concat", ["past", "x"], ["all"], name="all", axis=1),
        helper.make_node("Add", ["mask", "all"] if mask_first else ["all", "mask"], ["y"], name="add"),
    ]
    shapes = {"past": ["batch", "past"], "x": ["batch", "new"], "mask": ["batch", "total"]}
    graph = OnnxHost.from_model(small_models.model(nodes, [small_models.value(n, s) for n, s in shapes.items()])).graph
    assert str(graph.inputs[2].shape[1]) == str(graph.nodes[-1].output.shape[1]) == "new + past"
