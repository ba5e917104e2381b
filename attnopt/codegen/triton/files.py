"""Write a kernel out so that it stands without attnopt: source, assembly, binary, what they take, and an example that runs.

    write(spec, form, "sm_90", folder, "prefill_0")   ->   prefill_0.py  prefill_0.ptx  prefill_0.cubin  prefill_0.json
                                                           prefill_0_example.py

The source imports torch and triton only. No GPU is needed to write, and none to run the example in Triton's interpreter.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from attnopt.codegen.expressions import loads_of
from attnopt.codegen.triton.compile import Compiled
from attnopt.codegen.triton.expressions import pointer
from attnopt.codegen.triton.kernel_cache import compiled
from attnopt.codegen.triton.prefill import Form, expressions, supports
from attnopt.codegen.triton.tiles import ARCHITECTURES
from attnopt.ir.expr import Const, Expr, Index
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

SUFFIXES = {"cuda": (".ptx", ".cubin"), "hip": (".amdgcn", ".hsaco")}
EXAMPLE = '''\
"""Runs {name}.py on random tensors. Without a GPU: TRITON_INTERPRET=1 python {name}_example.py"""

import os

import torch
from {name} import attention

device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
batch, heads, key_heads, value_heads, q_len, kv_len = {sizes}

q = torch.randn(batch, heads, q_len, {form.width}, dtype=torch.{form.dtype}, device=device)
k = torch.randn(batch, key_heads, kv_len, {form.width}, dtype=torch.{form.dtype}, device=device)
v = torch.randn(batch, value_heads, kv_len, {form.value_width}, dtype=torch.{form.dtype}, device=device)
{operands}print(attention({arguments}))
'''
LENGTH = 40  # of the example: more than a tile's keys in the interpreter, and soon done


def write(spec: AttentionSpec, form: Form, architecture: str, folder: Path, name: str) -> Compiled | Refusal:
    """Write the files of one kernel into an existing folder; nothing is written where it is refused."""
    if (refused := supports(spec, form)) is not None:
        return refused
    made = compiled(spec, form, architecture)
    if isinstance(made, Refusal):
        return made
    assembly, binary = SUFFIXES[ARCHITECTURES[architecture].backend]
    (folder / f"{name}.py").write_text(made.source, encoding="utf-8")
    (folder / f"{name}_example.py").write_text(example(spec, form, name), encoding="utf-8")
    (folder / f"{name}{assembly}").write_text(made.assembly, encoding="utf-8")
    (folder / f"{name}{binary}").write_bytes(made.binary)
    (folder / f"{name}.json").write_text(json.dumps(resources(spec, form, made), indent=2) + "\n", encoding="utf-8")
    return made


def resources(spec: AttentionSpec, form: Form, made: Compiled) -> dict[str, object]:
    import triton

    return {
        "spec": str(spec),
        "form": asdict(form) | {"operands": dict(form.operands)},
        "architecture": made.architecture,
        "tile": asdict(made.tile),
        "registers": made.registers,
        "spilled_bytes": made.spills,
        "shared_memory_bytes": made.shared_memory,
        "copy_engine": made.copy_engine,
        "specialised_warps": made.specialised,
        "tensor_core_instructions": list(made.tensor_cores),
        "triton": triton.__version__,
    }


def example(spec: AttentionSpec, form: Form, name: str) -> str:
    heads, key_heads, value_heads = spec.head_counts or (2, 1, 1)
    made = operand_lines(spec, form)
    return EXAMPLE.format(
        name=name, form=form, sizes=f"2, {heads}, {key_heads}, {value_heads}, {LENGTH}, {LENGTH}",
        operands="".join(f"{argument} = {text}\n" for argument, text in made.items()), arguments=", ".join(["q", "k", "v", *made]),
    )  # fmt: skip


def operand_lines(spec: AttentionSpec, form: Form) -> dict[str, str]:
    """For each operand an expression that makes a tensor which every load of it stays inside of."""
    dtypes, loads = dict(form.operands), [load for expr in expressions(spec) for load in loads_of(expr)]
    lines: dict[str, str] = {}
    for operand in spec.operands:
        reads = [load.indices for load in loads if load.operand == operand]
        shape = ", ".join(longest(indices) for indices in zip(*reads, strict=True))
        if "float" in dtypes[operand]:
            lines[pointer(operand)[2:]] = f"torch.randn(({shape},), dtype=torch.{dtypes[operand]}, device=device)"
        else:  # padding that hides nothing, one document
            lines[pointer(operand)[2:]] = f"torch.ones(({shape},), dtype=torch.{dtypes[operand]}, device=device)"
    return lines


def longest(indices: tuple[Expr, ...]) -> str:
    """How long a dimension must be that is read at these indices; computed ones get room for every distance."""
    sizes = {"b": "batch", "h": "heads", "q": "q_len", "row": "q_len", "k": "kv_len"}
    named = {sizes[i.name] if isinstance(i, Index) else str(int(i.value) + 1) if isinstance(i, Const) else "" for i in indices}
    return named.pop() if len(named) == 1 and "" not in named else "q_len + kv_len"
