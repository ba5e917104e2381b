"""Write the kernels of the decode family out so that they stand without attnopt, as files.py does for prefill.

write(spec, form, "sm_90", folder, "attention_0_decode")   ->   attention_0_decode.py    attention_0_decode.json
    attention_0_decode.ptx  .cubin (the splits)    attention_0_decode_merge.ptx  .cubin    attention_0_decode_example.py
"""

from __future__ import annotations

import json
from pathlib import Path

from attnopt.codegen.triton.compile import Compiled
from attnopt.codegen.triton.decode import needed, supports
from attnopt.codegen.triton.decode_cache import Side, side_of
from attnopt.codegen.triton.files import LENGTH, SUFFIXES, operand_lines, resources
from attnopt.codegen.triton.kernel_cache import compiled_decode, compiled_merge
from attnopt.codegen.triton.prefill import Form
from attnopt.codegen.triton.tiles import ARCHITECTURES
from attnopt.ir.packing import tokens_per_scale
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

EXAMPLE = '''\
"""Runs {name}.py on random tensors. Without a GPU: TRITON_INTERPRET=1 python {name}_example.py"""

import os

import torch
from {name} import attention

device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
batch, heads, key_heads, value_heads, q_len, kv_len = {sizes}

q = torch.randn(batch, heads, q_len, {form.width}, dtype=torch.{form.dtype}, device=device)
{lines}print(attention({arguments}))
'''
CODES = {
    "plain": "torch.randn({shape}, device=device).to(torch.{dtype})",
    "int8": "torch.randint(-128, 128, ({shape}), dtype=torch.int8, device=device)",
    "int4": "torch.randint(0, 256, ({shape}), dtype=torch.uint8, device=device)",
    "int2": "torch.randint(0, 256, ({shape}), dtype=torch.uint8, device=device)",
    "fp8": "torch.randn({shape}, device=device).to(torch.float8_e4m3fn)",
}


def write(spec: AttentionSpec, form: Form, architecture: str, folder: Path, name: str) -> Compiled | Refusal:
    """Write the files of one spec into an existing folder; nothing is written where it is refused."""
    if (refused := supports(spec, form)) is not None:
        return refused
    made = compiled_decode(spec, form, architecture)
    if isinstance(made, Refusal):
        return made
    merge = compiled_merge(spec, form, architecture, made.tile)
    if isinstance(merge, Refusal):
        return merge
    assembly, binary = SUFFIXES[ARCHITECTURES[architecture].backend]
    (folder / f"{name}.py").write_text(made.source, encoding="utf-8")
    (folder / f"{name}_example.py").write_text(example(spec, form, name), encoding="utf-8")
    for kernel, stem in ((made, name), (merge, f"{name}_merge")):
        (folder / f"{stem}{assembly}").write_text(kernel.assembly, encoding="utf-8")
        (folder / f"{stem}{binary}").write_bytes(kernel.binary)
    told = resources(spec, form, made) | {"merge": {"registers": merge.registers, "spilled_bytes": merge.spills}}
    (folder / f"{name}.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return made


def example(spec: AttentionSpec, form: Form, name: str) -> str:
    heads, key_heads, value_heads = spec.head_counts or (2, 1, 1)
    lines = cache_lines(spec, form)
    operands = operand_lines(spec.with_(cache=None), form)
    arguments = ["q", "k", "v", *operands, *(part for part in lines if part not in ("k", "v"))]
    return EXAMPLE.format(
        name=name, form=form, sizes=f"2, {heads}, {key_heads}, {value_heads}, 1, {LENGTH}", arguments=", ".join(arguments),
        lines="".join(f"{argument} = {text}\n" for argument, text in (lines | operands).items()),
    )  # fmt: skip


def cache_lines(spec: AttentionSpec, form: Form) -> dict[str, str]:
    """For k, v and what the kernel reads beside them, an expression that makes a tensor; in the order of its parameters."""
    sides = {name: side_of(spec, form, name) for name in "kv"}
    page = 0 if spec.cache is None or spec.cache.word("layout") != "paged" else spec.cache.count("page")
    held, lines = needed(spec, form, sides), {}
    for name, side in sides.items():
        first, tokens = (f"batch * -(-kv_len // {page})", str(page)) if page else ("batch", "kv_len")
        shape = f"{first}, {'key' if name == 'k' else 'value'}_heads, {tokens}, {side.stored}"
        lines[name] = CODES[side.storage].format(shape=shape, dtype=side.dtype)
    for name, side in sides.items():
        for part, text in (
            ("scales", "torch.rand({}, device=device) * 0.02"),
            ("zeros", "torch.randn({}, device=device).round()"),
        ):
            if f"{name}_{part}" in held:
                made = text.format(scale_shape(spec, form, name, side, page))
                lines[f"{name}_{part}"] = f"({made}).to(torch.{side.scale_dtype})"
    if page:
        lines["pages"] = f"torch.arange(batch * -(-kv_len // {page}), dtype=torch.int32, device=device).view(batch, -1)"
    if "lengths" in held:
        lines["lengths"] = "torch.full((batch,), kv_len, dtype=torch.int32, device=device)"
    return lines


def scale_shape(spec: AttentionSpec, form: Form, name: str, side: Side, page: int) -> str:
    assert spec.cache is not None
    width, shared = form.width if name == "k" else form.value_width, tokens_per_scale(spec.cache, name)
    columns = width if side.scales in ("channel", "block") else -(-width // side.group)
    heads = f"{'key' if name == 'k' else 'value'}_heads"
    if shared == 0:
        return f"batch, {heads}, 1, {columns}"
    if page:
        return f"batch * -(-kv_len // {page}), {heads}, {page // shared}, {columns}"
    return f"batch, {heads}, -(-kv_len // {shared}), {columns}"
