"""Compile an emitted kernel for a CPU, on a machine that need not be it, and load what was compiled.

    made = compile_source(source, host())     ->   Compiled(cpu=…, form="so", library=b"\\x7fELF…")
    loaded(made)(q, k, v, …, o)               ->   o is written

A shared library needs TVM's runtime alone to run; to link it takes the system's C compiler. Where there is none, what LLVM read is kept
and made into machine code anew by each process ("ll"); for a machine of another kind it is object code ("o").
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnopt.codegen.emitted import load
from attnopt.codegen.tvm.availability import load_runtime, missing
from attnopt.codegen.tvm.cpu import Cpu, host
from attnopt.ir.site import Refusal

ENTRY = "attention"  # the function of an emitted file
OPTIMISED = "ll"  # LLVM's own text


@dataclass(frozen=True)
class Compiled:
    """A kernel: TVMScript, and what the machine runs in one of three forms: "so", "ll" or "o"."""

    cpu: str
    source: str
    form: str
    library: bytes


def compile_source(source: str, cpu: Cpu) -> Compiled | Refusal:
    """Refuses what TVM does, in its own words, and where it is missing."""
    if (reason := missing()) is not None:
        return Refusal(reason)
    try:
        with ThreadPoolExecutor(1) as alone:
            return alone.submit(compile_alone, source, cpu).result()
    except Exception as failure:  # whatever a pass of the compiler throws
        return Refusal(f"TVM cannot compile it: {said(failure)}", cpu.name)


def compile_alone(source: str, cpu: Cpu) -> Compiled:
    """For the top of a thread: TVM's parser asks for the whole stack at every step, and to name a frame of generated code (a traced
    model runs as such) Python looks through all modules that are loaded. Below a model that took two thirds of the time.
    """
    import tvm

    made = tvm.compile(getattr(load(source), ENTRY), target=tvm.target.Target(cpu.target))
    return Compiled(cpu.name, source, *library(made, cpu))


def said(failure: Exception) -> str:
    """The line of an error that says what is wrong: diagnostics draw the place around it."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()] or [type(failure).__name__]
    return next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")


def library(made: Any, cpu: Cpu) -> tuple[str, bytes]:
    """Which form, and its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        if linkable(cpu):
            try:
                made.export_library(str(path := Path(folder) / "kernel.so"))
                return "so", path.read_bytes()
            except (RuntimeError, ValueError, OSError):  # no compiler that links
                return OPTIMISED, made.mod.inspect_source(OPTIMISED).encode()
        made.mod.write_to_file(str(path := Path(folder) / "kernel.o"), "o")
        return "o", path.read_bytes()


def linkable(cpu: Cpu) -> bool:
    """Whether this system makes libraries for that one."""
    return cpu.triple == host().triple


def assembly(source: str, cpu: Cpu) -> str:
    """What the kernel is in the instructions of the CPU."""
    import tvm

    made = tvm.compile(getattr(load(source), ENTRY), target=tvm.target.Target(cpu.target))
    text: str = made.mod.inspect_source("asm")
    return text


def loaded(made: Compiled) -> Callable[..., None]:
    """The kernel as a function of tensors, by DLPack. Raises ValueError for object code, OSError where the system refuses it."""
    if made.form == "o":
        raise ValueError(f"it is object code for {made.cpu}, which this machine is not")
    load_runtime()
    if made.form == OPTIMISED:
        import tvm  # noqa: F401  (the compiler, which reads such files)
    import tvm_ffi

    with tempfile.TemporaryDirectory() as folder:  # once it is loaded, its file may go
        path = Path(folder) / f"kernel.{made.form}"
        path.write_bytes(made.library)
        kernel: Callable[..., None] = tvm_ffi.load_module(str(path))[ENTRY]
    return kernel
