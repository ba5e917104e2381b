"""CUDA source of a spec, from the same expressions: kernels/cuda.py filled in, and printed by TVM. No GPU is needed, nor its compiler.

cuda_source(parse("softmax scale(0.125) causal"), Form(64, 64, "float16"))   ->   extern "C" __global__ … attention_kernel(…)
"""

from __future__ import annotations

from attnopt.codegen.emitted import load
from attnopt.codegen.prefill_form import Form, expressions, from_rows, positive_scale
from attnopt.codegen.skipped_tiles import skipped
from attnopt.codegen.specialise import Slot, Value, specialise
from attnopt.codegen.template import joined
from attnopt.codegen.tvm.compile import ENTRY, said
from attnopt.codegen.tvm.expressions import Printer, bucket_function, buckets_of
from attnopt.codegen.tvm.operand_buffers import buffer_lines, buffer_name
from attnopt.codegen.tvm.prefill import IMPORTS, mask_holes, range_holes, ranks, row_holes, score_hole, supports
from attnopt.codegen.tvm.visits import knowing_list, with_list
from attnopt.ir.ranges import key_range
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

PARTS = ("prefill_holes", "sight", "cuda")
BLOCK_Q, BLOCK_K = 64, 32  # threads of a block, and keys in shared memory at a time
SHARED = 48 * 1024  # bytes of it that any GPU gives a block without being asked
TARGET = {"kind": "cuda", "arch": "sm_80"}  # of the source nothing depends on it
HEAD = """\
// Attention: {spec}
// q, k {form.width} and v {form.value_width} channels of {form.dtype}. A simple schedule, untuned: a thread holds one query.
// Launch (ceil(queries / {block_q}), heads, batch) blocks of {block_q} threads. n_q, n_k queries and keys; n_h, n_g, n_e heads of q, k, v;
// s_… strides, in elements.

"""


def cuda_source(spec: AttentionSpec, form: Form) -> str | Refusal:
    """The source of one kernel, or why there is none."""
    if (refused := supports(spec, form)) is not None:
        return refused
    if spec.precision is not None:
        return Refusal("this schedule rounds neither queries nor keys", spec.precision)
    if spec.qk_norm is not None:
        return Refusal("this schedule does not normalise queries and keys", spec.qk_norm)
    if skipped(spec.selection) is not None:
        return Refusal("this schedule skips no values", spec.selection)
    if keys_at_once(form) == 0:
        return Refusal(f"rows of {form.width} and {form.value_width} channels do not fit shared memory", spec.width)
    import tvm

    try:
        made = tvm.compile(getattr(load(emit(spec, form)), ENTRY), target=tvm.target.Target(TARGET, host="llvm"))
    except Exception as failure:  # whatever a pass of the compiler throws
        return Refusal(f"TVM cannot print it as CUDA: {said(failure)}")
    text: str = made.mod.imports[0].inspect_source("cuda")
    return HEAD.format(spec=spec, form=form, block_q=BLOCK_Q) + text


def keys_at_once(form: Form) -> int:
    most = SHARED // (4 * (form.width + form.value_width))
    return min(BLOCK_K, most // 8 * 8)


def emit(spec: AttentionSpec, form: Form) -> str:
    """The TVMScript of a kernel for a GPU. Call `supports` first."""
    plain = with_list(from_rows(spec))
    scope = key_range(plain.mask)
    scale, terms = positive_scale(plain)
    buckets = buckets_of(expressions(plain))
    printer = Printer(dict(form.operands)).knowing({term: f"{name}(q, k)" for term, name in buckets.items()})
    printer = knowing_list(printer, spec.selection)
    holes = (
        score_hole(printer, terms)
        | mask_holes(printer, plain.mask, scope)
        | row_holes(printer, plain)
        | range_holes(printer, scope)
    )
    if functions := "\n\n".join(bucket_function(term, name) for term, name in buckets.items()):  # type: ignore[arg-type]
        holes |= {"first_key": f"{functions}\n\n{holes['first_key']}"}
    may_be_empty = plain.mask is not None and not (scope.never_empty and plain.offset is None)
    decided: dict[str, Value] = {
        "DTYPE": form.dtype, "D": form.width, "E": form.value_width, "BLOCK_Q": BLOCK_Q, "BLOCK_K": keys_at_once(form), "SCALE": scale,
        "SCORES": bool(terms), "MASK": plain.mask is not None, "RANGE": scope.bounded, "LEADING": scope.leading is not None,
        "OFFSET": plain.offset is not None, "SINK": plain.sink is not None, "LSE": form.lse,
        "MEAN_OF_EMPTY": may_be_empty and plain.empty_row == "mean" and plain.sink is None,
    }  # fmt: skip
    names = tuple(buffer_name(operand) for operand in spec.operands)
    slots = [
        Slot("given", tuple(f"p_{name}: T.handle" for name in names), ()),
        Slot("p_lse", ("p_lse: T.handle",) * form.lse, ("p_lse",)),
        Slot("operands", names, names),
        Slot("held_values", (), ()),
    ]
    template = joined("attnopt.codegen.tvm", PARTS, IMPORTS)
    template = template.replace("    match_operands()\n", buffer_lines(spec.operands, ranks(plain), dict(form.operands)))
    text = specialise(template, decided, holes, slots, keep="attention")
    return f'"""Attention on a GPU, simply scheduled: {spec}"""\n\n{text}'
