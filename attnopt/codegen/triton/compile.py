"""Compile a spec's kernel for an architecture, on a machine that need not have it, and read what the compiler says it takes.

    compile_for(spec, form, "sm_90", tile)   ->   Compiled(assembly=PTX, binary=cubin, registers=168, spills=0, shared_memory=98304, …)

The figures are those of the compiler that makes the binary: cuobjdump's resource usage of a cubin, the metadata of an hsaco.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnopt.codegen.emitted import load
from attnopt.codegen.expressions import loads_of
from attnopt.codegen.triton.configurations import configurations
from attnopt.codegen.triton.expressions import pointer
from attnopt.codegen.triton.low_precision import AS_IT_IS, refused_by, scores, values
from attnopt.codegen.triton.prefill import Form, constants, emit, expressions, from_rows
from attnopt.codegen.triton.row_norms import gains
from attnopt.codegen.triton.tiles import ARCHITECTURES, Tile
from attnopt.ir.ranges import key_range
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

TYPES = {
    "float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "float64": "*fp64", "bool": "*i1", "uint8": "*u8", "int8": "*i8",
    "int16": "*i16", "int32": "*i32", "int64": "*i64", "fp8": "*fp8e4nv", "fp16": "*fp16",
}  # fmt: skip
FACTORS = ("p_lse", "p_norms", "p_q_scales", "p_k_scales", "p_v_scales", "p_v_means", "p_shifts", "p_deltas")
ALIGNED = 16  # bytes and elements: pointers of torch are aligned, and so are strides of rows of whole vectors


@dataclass(frozen=True)
class Compiled:
    """registers of a thread; spills: bytes of a thread that went to memory; shared_memory: bytes of a program."""

    architecture: str
    tile: Tile
    source: str
    assembly: str
    binary: bytes
    registers: int
    spills: int
    shared_memory: int

    @property
    def figures(self) -> dict[str, Any]:
        """What reports say of it."""
        sizes = [self.tile.block_q, self.tile.block_k, self.tile.num_warps, self.tile.num_stages]
        return {"tile": sizes, "registers": self.registers, "shared_memory_bytes": self.shared_memory}

    @property
    def tensor_cores(self) -> tuple[str, ...]:
        """Which tensor-core instructions stand in the assembly."""
        known = r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_s?mfma\w*?(?=_f|_i|_b))"
        return tuple(sorted(set(re.findall(known, self.assembly))))

    @property
    def copy_engine(self) -> bool:
        """Whether blocks of rows are read by the copy engine."""
        return "cp.async.bulk.tensor" in self.assembly

    @property
    def specialised(self) -> bool:
        """Whether warps have parts of their own: then they also have numbers of registers of their own."""
        return "setmaxnreg" in self.assembly

    def refusal(self) -> Refusal | None:
        """None where the kernel runs as it was meant to."""
        if self.tile.specialised and not self.specialised:
            return Refusal("the compiler did not specialise warps", self.tile)
        if self.tile.descriptors and not self.copy_engine:
            return Refusal("the compiler did not use the copy engine", self.tile)
        limit = ARCHITECTURES[self.architecture].shared_memory
        if self.shared_memory > limit:
            return Refusal(f"{self.shared_memory} bytes of shared memory; {self.architecture} has {limit}", self.tile)
        return Refusal(f"{self.spills} bytes of registers spill", self.tile) if self.spills else None


def compile_best(spec: AttentionSpec, form: Form, architecture: str) -> Compiled | Refusal:
    """The first tile of the table that neither spills nor exceeds the shared memory."""
    refused: Refusal | None = None
    for tile in configurations(spec, form, architecture):
        compiled = compile_for(spec, form, architecture, tile)
        refused = compiled if isinstance(compiled, Refusal) else compiled.refusal()
        if refused is None:
            return compiled
    assert refused is not None
    return refused


def compile_for(spec: AttentionSpec, form: Form, architecture: str, tile: Tile) -> Compiled | Refusal:
    """The kernel as assembly and binary, for tensors that are contiguous in their last dimension. Refuses what the compiler does."""
    about = ARCHITECTURES[architecture]
    if (refused := refused_by(architecture, spec)) is not None:
        return refused
    source = emit(spec, form, tile, about.backend)
    kernel = load(source).prefill
    contiguous = dict.fromkeys(last_strides(spec) & set(kernel.arg_names), 1)
    blocks = block_shapes(spec, form, tile, about.backend)
    stored = stored_as(spec, form)
    signature = {name: "constexpr" if name in contiguous else type_of(name, form, blocks, stored) for name in kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", ALIGNED]] for at, name in enumerate(kernel.arg_names) if is_aligned(name, form, spec)}
    return built(kernel, signature, contiguous, aligned, architecture, tile, source)


def built(
    kernel: Any, signature: dict[str, str], constants: Any, aligned: Any, architecture: str, tile: Tile, source: str
) -> Compiled | Refusal:
    """A kernel of a source, compiled for these types of its parameters."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    about = ARCHITECTURES[architecture]
    try:
        with quiet(tile.specialised):
            made = triton.compile(
                ASTSource(kernel, signature, constants, aligned),
                target=GPUTarget(about.backend, about.version, about.warp_size),
                options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
            )
    except (RuntimeError, triton.TritonError) as error:  # a compiler pass that failed, with its own words
        return Refusal(f"Triton cannot compile it: {str(error).strip().splitlines()[0]}", tile)
    assembly, binary = (
        (made.asm["ptx"], made.asm["cubin"]) if about.backend == "cuda" else (made.asm["amdgcn"], made.asm["hsaco"])
    )
    registers, spills = of_cubin(binary) if about.backend == "cuda" else of_amdgcn(assembly)
    return Compiled(architecture, tile, source, assembly, binary, registers, spills, made.metadata.shared)


@contextlib.contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Without what a pass of the compiler prints when it gives up: it writes the whole kernel to the process's own stderr."""
    if not wanted:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def block_shapes(spec: AttentionSpec, form: Form, tile: Tile, backend: str) -> dict[str, tuple[int, int]]:
    """Rows and channels of the blocks that each descriptor moves; channels come first in values of fp8."""
    plain = from_rows(spec)
    known = constants(plain, form, tile, backend, key_range(plain.mask))
    rows = {"q": tile.block_q, "k": tile.block_k, "v": tile.block_k}
    widths = {"q": "D", "k": "D", "v": "E"}
    pieces = {"": "MAIN", "_rest": "REST"}
    found = {f"d_{x}{rest}": (rows[x], int(known[f"{widths[x]}_{piece}"])) for x in rows for rest, piece in pieces.items()}
    return found | {name: block[::-1] for name, block in found.items() if name.startswith("d_v") and values(spec) == "fp8"}


def stored_as(spec: AttentionSpec, form: Form) -> dict[str, str]:
    """The types of q, k and v as the kernel reads them."""
    rows = "int8" if scores(spec) else form.dtype
    return {"q": rows, "k": rows, "v": form.dtype if values(spec) == AS_IT_IS else values(spec)}


def last_strides(spec: AttentionSpec) -> set[str]:
    """The strides of the last dimensions of operands, which are 1: Triton compiles a 1 that it is given as a constant."""
    loads = [load for expr in expressions(spec) for load in loads_of(expr)]
    names = {f"s_{pointer(load.operand)[2:]}_{len(load.indices) - 1}" for load in loads}
    return names | {f"s_{pointer(name)[2:]}_1" for name in gains(spec.qk_norm).values()}


def type_of(parameter: str, form: Form, blocks: dict[str, tuple[int, int]], stored: dict[str, str]) -> str:
    """The Triton type of a parameter of an emitted kernel."""
    if parameter in blocks:
        rows, width = blocks[parameter]
        return f"tensordesc<{TYPES[stored[parameter[2]]].removeprefix('*')}[1, 1, {rows}, {width}]>"
    if parameter in ("p_q", "p_k", "p_v"):
        return TYPES[stored[parameter[2]]]
    if parameter == "p_o":
        return TYPES[form.dtype]
    if parameter in FACTORS:
        return TYPES["float32"]
    if parameter in ("p_q_starts", "p_k_starts", "p_work", "p_items", "p_list"):
        return TYPES["int32"]
    operands = {pointer(name): TYPES[dtype] for name, dtype in form.operands}
    return operands.get(parameter, "i32")


def is_aligned(parameter: str, form: Form, spec: AttentionSpec) -> bool:
    """Whether a parameter is a multiple of ALIGNED where tensors are as torch makes them; codes are padded to that."""
    if parameter.startswith("p_"):
        return parameter != "p_items"  # a part of another tensor
    padded = {"q": scores(spec), "k": scores(spec), "v": values(spec) == "fp8"}
    width = {"q": form.width, "k": form.width, "v": form.value_width}.get(parameter[2:3], 1)
    strides = {f"s_{x}" for x in ("qb", "qh", "qm", "kb", "kh", "kn", "vb", "vh", "vn")}
    return parameter in strides and (padded[parameter[2]] or width % ALIGNED == 0)


def of_cubin(binary: bytes) -> tuple[int, int]:
    """Registers, and bytes on the stack: ptxas puts what it spills there, and a kernel of Triton has nothing else on it."""
    from triton import knobs

    tool: Any = knobs.nvidia.cuobjdump
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        told = subprocess.run([tool.path, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {told}")
    return int(found[1]), int(found[2])


def of_amdgcn(assembly: str) -> tuple[int, int]:
    """Vector registers (accumulators counted in), and bytes of scratch memory of a work item."""
    numbers = {key: int(value) for key, value in re.findall(r"^\s*\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    return numbers["vgpr_count"], numbers["private_segment_fixed_size"]
