"""Write a kernel out so that it stands without attnopt: TVMScript, library, launcher, an example that runs, and CUDA source.

    write(spec, form, host(), folder, "attention_0")   ->   attention_0_tir.py  libattention_0.so  attention_0.py
                                                            attention_0_example.py  attention_0.cu  attention_0.json

The TVMScript imports TVM only, the launcher numpy or torch and TVM's runtime. For a machine of another system the library is object
code (.o), which its linker makes a library of. The CUDA source is of the same spec by a simple schedule, and untuned: for GPUs there are
Triton kernels.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.triton.decode_files import cache_lines
from attnopt.codegen.triton.expressions import pointer
from attnopt.codegen.triton.files import LENGTH, operand_lines
from attnopt.codegen.triton.row_norms import gains
from attnopt.codegen.tvm import decode, prefill
from attnopt.codegen.tvm.availability import version
from attnopt.codegen.tvm.compile import Compiled
from attnopt.codegen.tvm.cpu import Cpu
from attnopt.codegen.tvm.cuda import cuda_source
from attnopt.codegen.tvm.decode_tiles import decode_tile
from attnopt.codegen.tvm.kernel_cache import compiled
from attnopt.codegen.tvm.launcher import example, launcher
from attnopt.codegen.tvm.tuning import chosen_tile
from attnopt.ir.ranges import key_range
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

ROWS = 4  # query heads that share their keys, for which decoding kernels are written


@dataclass(frozen=True)
class Emitted:
    """What was written for one kernel: files by name, in the folder; tile: its sizes."""

    cpu: str
    tile: dict[str, int]
    library: str
    library_bytes: int
    files: tuple[str, ...]

    @property
    def figures(self) -> dict[str, Any]:
        """What reports say of it."""
        return asdict(self) | {"files": list(self.files)}


def write(spec: AttentionSpec, form: Form, cpu: Cpu, folder: Path, name: str) -> Emitted | Refusal:
    """Write the files of one kernel into an existing folder; nothing is written where it is refused."""
    if (refused := prefill.supports(spec, form, cpu)) is not None:
        return refused
    tile = chosen_tile(spec, form, cpu)
    made = compiled("prefill", spec, form, tile, cpu, lambda: prefill.emit(spec, form, tile, cpu))
    if isinstance(made, Refusal):
        return made
    random = {x: f"torch.randn(batch, {side}_heads, kv_len, {width}, dtype=torch.{form.dtype})"
              for x, side, width in (("k", "key", form.width), ("v", "value", form.value_width))}  # fmt: skip
    lines = random | operand_lines(spec, form)
    lines |= lines_without_loads(spec, form)
    texts = {f"{name}_example.py": example(spec, form, name, lines, LENGTH, LENGTH)}
    cuda = cuda_source(spec, form)
    if not isinstance(cuda, Refusal):
        texts[f"{name}.cu"] = cuda
    return written(spec, form, asdict(tile), made, folder, name, [*lines], texts, cpu)


def lines_without_loads(spec: AttentionSpec, form: Form) -> dict[str, str]:
    """Operands that no expression reads: a list of all blocks, gains of each head."""
    lines, dtypes = {}, dict(form.operands)
    if spec.selection is not None:
        name = str(spec.selection.operand("operand"))
        blocks = ", ".join(f"-(-{length} // {spec.selection.count(at)})" for at, length in enumerate(("q_len", "kv_len")))
        lines[name] = f"torch.ones((batch, heads, {blocks}), dtype=torch.{dtypes[name]}, device=device)"
    for side, name in gains(spec.qk_norm).items():
        heads = "heads" if side == "q" else "key_heads"
        lines[name] = f"torch.ones(({heads}, {form.width}), dtype=torch.{dtypes[name]}, device=device)"
    return {pointer(name)[2:]: text for name, text in lines.items()}


def write_decode(spec: AttentionSpec, form: DecodeForm, cpu: Cpu, folder: Path, name: str) -> Emitted | Refusal:
    """The same of the kernel for few queries on a cache, whose parts the launcher takes after q, k and v."""
    if (refused := decode.supports(spec, form)) is not None:
        return refused
    tile = decode_tile(cpu, ROWS, windowed=bool(key_range(spec.mask).first))
    made = compiled("decode", spec, form, tile, cpu, lambda: decode.emit(spec, form, tile, cpu))
    if isinstance(made, Refusal):
        return made
    lines = cache_lines(spec, form) | operand_lines(spec.with_(cache=None), form)
    texts = {f"{name}_example.py": example(spec, form, name, lines, 1, LENGTH)}
    return written(spec, form, asdict(tile), made, folder, name, [*lines], texts, cpu)


def written(
    spec: AttentionSpec, form: Form, tile: dict[str, int], made: Compiled, folder: Path, name: str, arguments: list[str],
    texts: dict[str, str], cpu: Cpu,
) -> Emitted:  # fmt: skip
    """arguments: what the launcher takes after q."""
    library = f"lib{name}.{made.form}"
    texts |= {f"{name}_tir.py": made.source, f"{name}.py": launcher(spec, form, cpu, name, ["q", *arguments], library)}
    told = Emitted(cpu.name, tile, library, len(made.library), (library, *sorted(texts), f"{name}.json"))
    figures = {"spec": str(spec), "form": asdict(form) | {"operands": dict(form.operands)}, **asdict(told), "tvm": version()}
    texts[f"{name}.json"] = json.dumps(figures, indent=2) + "\n"
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    (folder / library).write_bytes(made.library)
    return told
