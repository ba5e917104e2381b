"""The ways to compute a case on a CPU, each as a call whose masks are made before the clock runs.

sdpa      torch's scaled_dot_product_attention; a mask that is not plain causal, and ALiBi, as a tensor
eager     products and softmax as nodes of their own
flex      torch.compile(flex_attention) with its block mask, as its users write it
ort       onnxruntime's MultiHeadAttention, or GroupQueryAttention for grouped heads; other masks as a bias
attnopt   TVM's kernel
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnxruntime
import torch
from gpu.case import Case, Data
from gpu.flex import mask_of, score_of
from gpu.sdpa import NotSaid, mask_tensor
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnopt.ir.spec import parse
from attnopt.runtime.flex_source import compiler_at_hand

OURS, BASELINE = "attnopt", "sdpa"
FLEX_WIDTH, FLEX_LENGTH = 64, 2048  # it compiles for many seconds, anew for each row: measured where it may pay
Call = Callable[[], Tensor]


def sdpa(case: Case, data: Data) -> Call:
    mask, causal = mask_tensor(case, data), case.mask == "causal"
    options = {"scale": case.width**-0.5, "enable_gqa": case.heads != case.key_heads}
    return lambda: F.scaled_dot_product_attention(data.q, data.k, data.v, attn_mask=mask, is_causal=causal, **options)


def added_mask(case: Case, data: Data) -> Tensor | None:
    """What is added to the scores [1, 1 or H, Q, K]; minus infinity hides."""
    if case.mask == "full":
        return None
    mask = mask_tensor(case, data)
    if mask is None:
        mask = torch.ones(case.q_len, case.kv_len, dtype=torch.bool).tril()[None, None]
    return torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else mask


def eager(case: Case, data: Data) -> Call:
    mask, ratio = added_mask(case, data), case.heads // case.key_heads

    def call() -> Tensor:
        k, v = (x.repeat_interleave(ratio, 1) if ratio > 1 else x for x in (data.k, data.v))
        scores = data.q @ k.mT * case.width**-0.5
        return (scores if mask is None else scores + mask).softmax(-1) @ v

    return call


def flex(case: Case, data: Data) -> Call:
    if not compiler_at_hand():
        raise NotSaid("no C++ compiler")
    if case.width != FLEX_WIDTH or case.q_len < FLEX_LENGTH:
        raise NotSaid(f"measured for {FLEX_WIDTH} channels and {FLEX_LENGTH} tokens or more")
    mask, score = mask_of(case, data), score_of(case, data)
    blocks = None if mask is None else create_block_mask(mask, 1, None, case.q_len, case.kv_len, device="cpu")
    torch._dynamo.reset()  # one code object is compiled for a few shapes only, and there is a row for each
    attend = torch.compile(flex_attention, dynamic=False)
    options = {"scale": case.width**-0.5, "enable_gqa": case.heads != case.key_heads}
    return lambda: attend(data.q, data.k, data.v, score_mod=score, block_mask=blocks, **options)


def ort(case: Case, data: Data) -> Call:
    """Operators that read [B, L, H * D], which tensors are laid out as beforehand."""
    grouped, bias = case.heads != case.key_heads, None if case.mask in ("full", "causal") else added_mask(case, data)
    rows = [x.transpose(1, 2).flatten(2).contiguous() for x in (data.q, data.k, data.v)]
    given = dict(zip("qkv", (x.numpy() for x in rows), strict=True))
    if bias is not None:
        given["bias"] = bias.numpy()
    session = ort_session(case, grouped, None if bias is None else tuple(bias.shape))
    return lambda: torch.from_numpy(session.run(["o"], given)[0]).unflatten(2, (case.heads, -1)).transpose(1, 2)


def ort_session(case: Case, grouped: bool, bias: tuple[int, ...] | None) -> onnxruntime.InferenceSession:
    sizes = {"q": case.heads, "k": case.key_heads, "v": case.key_heads}
    inputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, (1, case.q_len, n * case.width)) for x, n in sizes.items()]
    held = []
    scale = {"scale": case.width**-0.5}
    if grouped:
        numbers = {"last": [case.kv_len - 1], "total": [case.kv_len]}
        held = [helper.make_tensor(name, TensorProto.INT32, (1,), value) for name, value in numbers.items()]
        node = helper.make_node("GroupQueryAttention", ["q", "k", "v", "", "", "last", "total"], ["o", "pk", "pv"],
                                domain="com.microsoft", num_heads=case.heads, kv_num_heads=case.key_heads, **scale)  # fmt: skip
    else:
        names = ["q", "k", "v"]
        if bias is not None:
            inputs.append(helper.make_tensor_value_info("bias", TensorProto.FLOAT, bias))
            names += ["", "", "bias"]
        node = helper.make_node("MultiHeadAttention", names, ["o"], domain="com.microsoft", num_heads=case.heads,
                                unidirectional=int(case.mask == "causal"), **scale)  # fmt: skip
    output = helper.make_tensor_value_info("o", TensorProto.FLOAT, (1, case.q_len, case.heads * case.width))
    graph = helper.make_graph([node], "attention", inputs, [output], held)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def attnopt(case: Case, data: Data) -> Call:
    operands = [data.operands[name] for name in parse(case.spec).operands]
    if case.kind == "decode":
        held = (*vars(data.cache).values(), operands, case.spec)
        return lambda: torch.ops.attnopt.tvm_decode(data.q, *held)
    return lambda: torch.ops.attnopt.tvm_attention(data.q, data.k, data.v, operands, case.spec)


def contenders(case: Case) -> dict[str, Callable[[Case, Data], Call]]:
    """A cache that is packed has no peers; one query is what sdpa and eager are for."""
    if case.kind == "decode":
        return {OURS: attnopt} | ({BASELINE: sdpa, "eager": eager} if case.cache == "bf16" else {})
    return {BASELINE: sdpa, "eager": eager, "flex": flex, "ort": ort, OURS: attnopt}


def ready(case: Case, data: Data) -> tuple[dict[str, Call], dict[str, str]]:
    """Calls of all that can compute the case, each of which has run, and what is wrong with the others."""
    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    for name, prepare in contenders(case).items():
        try:
            call = prepare(case, data)
            call()
        except NotSaid as reason:
            reasons[name] = str(reason)
        except Exception as failure:  # whatever a library says, the other rows must go on
            reasons[name] = (str(failure).strip().splitlines() or [type(failure).__name__])[0][:80]
        else:
            calls[name] = call
    return calls, reasons
