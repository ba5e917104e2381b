"""The Python file that calls a compiled kernel without attnopt: numpy or torch, and TVM's runtime.

launcher(spec, form, cpu, "attention_0", arguments, library)   ->   a file whose `attention(q, k, v, padding)` calls libattention_0.so
"""

from __future__ import annotations

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm.cpu import Cpu
from attnopt.ir.spec import AttentionSpec

TEXT = '''\
"""Attention: {spec}

attention({arguments}) calls lib{name}.so, which was compiled for {cpu} from {name}_tir.py.
{shapes}{linking}
Needs of TVM its runtime alone (pip install apache-tvm); TVM_NUM_THREADS says on how many threads it runs.
"""

import importlib.util
import os
from pathlib import Path

import tvm_ffi
from tvm_ffi.libinfo import load_lib_ctypes

os.environ.setdefault("TVM_BIND_THREADS", "0")  # else the thread that calls is tied to the first cores
package = importlib.util.find_spec("tvm").submodule_search_locations[0]
load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=[Path(package) / "lib"])
KERNEL = tvm_ffi.load_module(str(Path(__file__).with_name("lib{name}.so")))["attention"]


def attention({arguments}, o=None):
    """o [B, H, Q, {value_width}], made where it is not given: contiguous and of q's type."""
    given = [rows(x) for x in ({arguments})]
    if o is None:
        o = empty(given[0], (*given[0].shape[:3], {value_width}))
    KERNEL(*(tvm_ffi.from_dlpack(x) for x in (*given, o)))
    return o


def rows(x):
    """x with its last dimension contiguous; a copy only where it is not."""
    if hasattr(x, "stride"):  # of torch
        return x if x.ndim == 0 or x.stride(-1) == 1 else x.contiguous()
    if x.ndim == 0 or x.strides[-1] == x.itemsize:
        return x
    import numpy

    return numpy.ascontiguousarray(x)


def empty(like, shape):
    if hasattr(like, "stride"):
        return like.new_empty(shape)
    import numpy

    return numpy.empty(shape, like.dtype)
'''
LINKING = "\nMake the library of it on that machine first: cc -shared -o lib{name}.so {library}"
EXAMPLE = '''\
"""Runs {name}.py on random tensors."""

import torch
from {name} import attention

device = "cpu"
batch, heads, key_heads, value_heads, q_len, kv_len = {sizes}

q = torch.randn(batch, heads, q_len, {form.width}, dtype=torch.{form.dtype})
{lines}print(attention({arguments}))
'''


def launcher(spec: AttentionSpec, form: Form, cpu: Cpu, name: str, arguments: list[str], library: str) -> str:
    keys = (
        f"k [B, G, K, {form.width}], v [B, G, K, {form.value_width}]"
        if spec.cache is None
        else "k and v as the cache stores them"
    )
    shapes = f"q [B, H, Q, {form.width}] {form.dtype}, {keys}; numpy arrays or torch tensors, in any strides."
    return TEXT.format(
        spec=spec,
        name=name,
        cpu=cpu.name,
        arguments=", ".join(arguments),
        value_width=form.value_width,
        shapes=shapes,
        linking="" if library.endswith(".so") else LINKING.format(name=name, library=library),
    )


def example(spec: AttentionSpec, form: Form, name: str, lines: dict[str, str], queries: int, keys: int) -> str:
    """lines: for each argument but q an expression that makes it, in order."""
    heads, key_heads, value_heads = spec.head_counts or (2, 1, 1)
    return EXAMPLE.format(
        name=name, form=form, sizes=f"2, {heads}, {key_heads}, {value_heads}, {queries}, {keys}",
        lines="".join(f"{argument} = {text}\n" for argument, text in lines.items()), arguments=", ".join(["q", *lines]),
    )  # fmt: skip
