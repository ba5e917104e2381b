"""The command line: what it prints where, how it refuses, and that it leaves nothing behind when it does."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from attnopt import __version__
from attnopt.cli import main
from attnopt.codegen.tvm.availability import missing


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def attnopt(monkeypatch, capsys):
    """Run a command in this process, as the console script does."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["attnopt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Ended(ended.value.code or 0, printed.out, printed.err)

    return run


def write_attention(path, *, last_node="matmul"):
    """One attention of 4 heads of 16 spelled out in nodes; `last_node="add"` adds one more node after it."""
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4, "length", 16]) for n in "qkvo"]
    result = "o" if last_node == "matmul" else "attended"
    nodes = [
        helper.make_node("Transpose", ["k"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "turned"], ["scores"]),
        helper.make_node("Mul", ["scores", "scale"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], [result]),
    ]
    nodes += [helper.make_node("Add", [result, "scale"], ["o"])] * (last_node == "add")
    scale = numpy_helper.from_array(np.float32(0.25), "scale")
    save(path, nodes, tensors[:3], tensors[3:], [scale])
    return path


def save(path, nodes, inputs, outputs, constants):
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.fixture
def model(tmp_path):
    return write_attention(tmp_path / "model.onnx", last_node="add")


def same_outputs(first, second, shape=(2, 4, 9, 16)):
    """Whether two models of q, k, v compute the same on random inputs."""
    inputs = {name: np.random.default_rng(i).standard_normal(shape, dtype=np.float32) for i, name in enumerate("qkv")}
    a, b = (onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (first, second))
    return np.allclose(a.run(None, inputs)[0], b.run(None, inputs)[0], atol=1e-5)


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def test_version_and_help(attnopt):
    assert attnopt("--version") == Ended(0, f"attnopt {__version__}\n", "")
    shown = attnopt("--help")
    assert shown.code == 0
    assert all(command in shown.out for command in ("inspect", "optimize", "targets", "passes"))


def test_the_module_is_the_command():
    ended = subprocess.run([sys.executable, "-m", "attnopt", "inspect", "absent.onnx"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == "UnreadableModel: there is no file 'absent.onnx'. Check the path.\n"


def test_calibrate_says_what_it_measured_and_where_it_is(attnopt, monkeypatch, tmp_path):
    from dataclasses import replace

    from attnopt.cost.target import load_target

    def measured(*, said, clock=None):
        said("products of float32", 0.5)
        return replace(
            load_target("cpu")[0], description="toy, 2 threads", peak={"float32": 0.125}, bandwidth=2.5e10, measured="2026-01-02"
        )

    monkeypatch.setenv("ATTNOPT_CONFIG", str(tmp_path))
    monkeypatch.setattr("attnopt.plan.calibrate.calibrate.measured", measured)
    monkeypatch.setattr("attnopt.plan.calibrate.calibrate.tuned", lambda said: None)
    assert "no: attnopt calibrate" in attnopt("targets").out
    ended = attnopt("calibrate")
    (path,) = tmp_path.iterdir()
    assert ended.out == f"toy, 2 threads: 125 GFLOP/s of float32, 25 GB/s of memory\nwritten to {path}\n"
    assert "2026-01-02" in attnopt("targets").out
    assert next(t for t in json.loads(attnopt("targets", "--json").out) if t["name"] == "cpu")["measured"] == "2026-01-02"


def test_targets_and_passes_are_listed(attnopt):
    assert "h200" in attnopt("targets").out
    assert {t["name"] for t in json.loads(attnopt("targets", "--json").out)} >= {"cpu", "h200"}
    listed = json.loads(attnopt("passes", "--json").out)
    assert {p["name"] for p in listed if p["exact"]} >= {"fuse-attention", "pack-projections"}
    assert "dynamic-int8" in attnopt("passes").out


def test_inspect_prints_a_table_or_json_alone(attnopt, model):
    shown = attnopt("inspect", model, "--explain")
    assert (shown.code, shown.err) == (0, "")
    assert "softmax heads(4) width(16) scale(0.25)" in shown.out
    assert "missing: projection of queries not found: they are an input of the model, 'q'" in " ".join(shown.out.split())
    assert "no near misses" in shown.out
    record = json.loads(attnopt("inspect", model, "--json").out)
    assert set(record) == {"sites", "refusals"}
    (site,) = record["sites"]
    assert site["spec"] == "softmax heads(4) width(16) scale(0.25)"
    assert (site["shape"]["b"], site["shape"]["h"], site["flops"] > 0) == ("batch", "4", True)
    assert site["block"]["q"] is None and len(site["block"]["missing"]) == 4


def test_optimize_writes_a_model_that_computes_the_same(attnopt, model, tmp_path):
    output = tmp_path / "fast.onnx"
    ended = attnopt("optimize", model, "-o", output, "--select", "always", "--target", "cpu+onnxruntime")
    assert (ended.code, ended.err) == (0, "")
    assert "1 attention found, 1 replaced" in ended.out
    assert f"written to {output}" in ended.out
    assert "MultiHeadAttention" in operators(output)
    assert same_outputs(model, output)


def test_optimize_json_is_the_report(attnopt, model, tmp_path):
    output = tmp_path / "fast.onnx"
    ended = attnopt("optimize", model, "-o", output, "--select", "always", "--passes", "fuse-attention", "--json")
    report = json.loads(ended.out)
    assert (report["target"], report["runtime"], report["fused"]) == ("cpu", "onnxruntime", 1)
    assert output.exists()


@pytest.mark.parametrize(
    ("given", "fused"),
    [
        (["--passes", "dynamic-int8"], 0),
        (["--passes", "dynamic-int8,fuse-attention"], 1),
        (["--passes", "dynamic-int8", "--passes", "fuse-attention"], 1),
    ],
)
def test_passes_are_separated_by_commas_or_repeated(attnopt, model, tmp_path, given, fused):
    ended = attnopt("optimize", model, "-o", tmp_path / "fast.onnx", "--select", "always", "--json", *given)
    assert json.loads(ended.out)["fused"] == fused


def test_an_attention_that_is_the_output_of_the_model(attnopt, tmp_path):
    model, output = write_attention(tmp_path / "model.onnx"), tmp_path / "fast.onnx"
    assert attnopt("optimize", model, "-o", output, "--select", "always").code == 0
    assert "MultiHeadAttention" in operators(output)
    assert same_outputs(model, output)


def test_a_model_without_attention_stays_as_it_is(attnopt, tmp_path):
    model, output = tmp_path / "relu.onnx", tmp_path / "fast.onnx"
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 8]) for n in "xy"]
    save(model, [helper.make_node("Relu", ["x"], ["y"])], tensors[:1], tensors[1:], [])
    assert "no attention found" in attnopt("inspect", model).out
    ended = attnopt("optimize", model, "-o", output)
    assert ended.code == 0
    assert "no attention found, nothing replaced" in ended.out
    assert operators(output) == ["Relu"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--target", "h20"], "UnknownTarget: 'h20' is not a target. Did you mean 'h200'?"),
        (["--target", "cpu+onnx"], "UnknownTarget: 'cpu+onnx' is not a target. Did you mean 'cpu+onnxruntime'?"),
        (["--passes", "fuse-atention"], "UnknownPass: 'fuse-atention' is not a pass. Did you mean 'fuse-attention'?"),
        (["--budget", "-1"], "BudgetError: budget -1.0 is not a number of at least 0."),
        (["--budget", "nan"], "BudgetError: budget nan is not a number of at least 0."),
        (["--select", "fastest"], "BudgetError: select='fastest' is none of measure, model, always."),
        (["--calibration", "absent.npz"], "InputMismatch: cannot read calibration data:"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(attnopt, model, tmp_path, options, says):
    before = sorted(tmp_path.iterdir())
    ended = attnopt("optimize", model, "-o", tmp_path / "fast.onnx", *options)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(says)
    assert ended.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", ["empty", "cut off", "one array", "other names", "uneven"])
def test_damaged_calibration_data(attnopt, model, tmp_path, damage):
    data, output = tmp_path / "data.npz", tmp_path / "fast.onnx"
    names = [v.name for v in onnx.load(model).graph.input]
    arrays = {name: np.ones((3, 8), np.int64) for name in names}
    if damage == "other names":
        arrays = {f"{name}_": x for name, x in arrays.items()}
    elif damage == "uneven":
        arrays[names[0]] = arrays[names[0]][:1]
    np.savez(data, **arrays)
    if damage == "empty":
        data.write_bytes(b"")
    elif damage == "cut off":
        data.write_bytes(data.read_bytes()[:100])
    elif damage == "one array":
        with data.open("wb") as file:
            np.save(file, np.ones(3))
    ended = attnopt("optimize", model, "-o", output, "--budget", "0.01", "--calibration", data)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("InputMismatch: ")
    assert ended.err.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("fast.txt", "UnsupportedFormat: cannot write '.txt'"),
        ("fast", "UnsupportedFormat: cannot write 'fast'"),
        ("fast.pt2", "UnsupportedFormat: an ONNX model cannot be written as .pt2"),
        ("absent/fast.onnx", "OutputNotWritable: there is no folder"),
        ("folder.onnx", "OutputNotWritable: "),
    ],
)
def test_the_output_is_checked_before_the_work(attnopt, monkeypatch, model, tmp_path, output, says):
    (tmp_path / "folder.onnx").mkdir()
    monkeypatch.setattr("attnopt.api.optimize", lambda *_, **__: pytest.fail("the work began"))
    ended = attnopt("optimize", model, "-o", tmp_path / output)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(says)


def test_a_folder_that_cannot_be_written_is_found_by_trying(attnopt, monkeypatch, model, tmp_path):
    def refused(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    monkeypatch.setattr("attnopt.api.optimize", lambda *_, **__: pytest.fail("the work began"))
    ended = attnopt("optimize", model, "-o", tmp_path / "fast.onnx")
    assert ended.code == 2
    assert "cannot be written: Permission denied" in ended.err


@pytest.mark.parametrize("command", [["inspect"], ["optimize", "-o", "fast.onnx"]])
@pytest.mark.parametrize(("name", "content"), [("absent.onnx", None), ("junk.onnx", b"junk"), ("model.bin", b"junk")])
def test_unreadable_models(attnopt, monkeypatch, tmp_path, command, name, content):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ended = attnopt(*command, name)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(("UnreadableModel: ", "UnsupportedFormat: "))
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "fast.onnx").exists()


def test_a_truncated_model(attnopt, model):
    model.write_bytes(model.read_bytes()[:150])
    ended = attnopt("inspect", model)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("UnreadableModel: ")


@pytest.mark.parametrize("arguments", [["nosuch"], ["inspect"], ["inspect", "a.onnx", "--nosuch"], ["optimize", "a.onnx"]])
def test_wrong_usage_ends_with_2(attnopt, arguments):
    ended = attnopt(*arguments)
    assert ended.code == 2
    assert "Usage: attnopt" in ended.err


def test_what_libraries_print_does_not_spoil_the_json(attnopt, monkeypatch, model):
    from attnopt.api import inspect

    def noisy(path):
        print("converting ...")
        return inspect(path)

    monkeypatch.setattr("attnopt.api.inspect", noisy)
    ended = attnopt("inspect", model, "--json")
    assert len(json.loads(ended.out)["sites"]) == 1
    assert "converting" in ended.err


def test_unexpected_exceptions_pass_through(monkeypatch, model):
    def broken(path):
        raise RuntimeError("a defect")

    monkeypatch.setattr("attnopt.api.inspect", broken)
    monkeypatch.setattr(sys, "argv", ["attnopt", "inspect", str(model)])
    with pytest.raises(RuntimeError, match="a defect"):
        main()


def test_kernels_are_written(attnopt, tmp_path):
    ended = attnopt("kernels", write_attention(tmp_path / "m.onnx"), "--target", "h200", "-o", tmp_path / "made")
    assert ended.code == 0
    assert "attention_0  1      softmax heads(4) width(16) scale(0.25)" in ended.out
    assert {f.name for f in (tmp_path / "made").iterdir()} == {
        "attention_0.py", "attention_0_example.py", "attention_0.ptx", "attention_0.cubin", "attention_0.json",
    }  # fmt: skip


@pytest.mark.skipif(missing() is not None, reason="TVM is not installed")
def test_kernels_for_a_cpu(attnopt, tmp_path):
    model = write_attention(tmp_path / "m.onnx")
    ended = attnopt("kernels", model, "--target", "cpu", "--cpu", "haswell", "-o", tmp_path / "made")
    assert ended.code == 0
    assert "attention_0  1      softmax heads(4) width(16) scale(0.25)" in ended.out
    assert "haswell" in ended.out
    assert {f.name for f in (tmp_path / "made").iterdir()} == {
        "attention_0.py", "attention_0_tir.py", "attention_0_example.py", "libattention_0.so", "attention_0.json", "attention_0.cu",
    }  # fmt: skip


def test_kernels_for_no_machine(attnopt, tmp_path):
    model = write_attention(tmp_path / "m.onnx")
    for arguments, said in (
        (("cpu", "--cpu", "pentium"), "UnknownTarget: 'pentium' is not a target."),
        (("h200", "--cpu", "haswell"), "UnsupportedFormat: 'h200' is no CPU, and 'haswell' names one. Name the target cpu."),
    ):
        ended = attnopt("kernels", model, "--target", *arguments, "-o", tmp_path / "made")
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith(said)
        assert not (tmp_path / "made").exists()
