"""Write the kernels of an opened model: what `attnopt.kernels`, `Optimized.kernels` and the command line do alike.

target h200   ->   Triton kernels, compiled for sm_90          target cpu   ->   TVM kernels, compiled for this machine
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attnopt.cost.target import load_target
from attnopt.errors import OutputNotWritable, UnsupportedFormat
from attnopt.opening import Opened
from attnopt.patterns import recognise

if TYPE_CHECKING:
    from attnopt.codegen.site_kernels import SiteKernel
    from attnopt.codegen.tvm.cpu import Cpu


def require_kernels(target: str, cpu: str | None = None) -> str | Cpu:
    """What kernels for a target are compiled for: a GPU's architecture, or this CPU, or the one that is named as LLVM does.

    Raises UnknownTarget, or UnsupportedFormat where there are no kernels.
    """
    from attnopt.codegen.triton.availability import missing
    from attnopt.codegen.triton.tiles import ARCHITECTURES

    machine, _ = load_target(target)
    if machine.kind == "cpu":
        return require_cpu(cpu)
    if cpu is not None:
        raise UnsupportedFormat(f"'{machine.name}' is no CPU, and '{cpu}' names one", next_move="Name the target cpu.")
    if machine.arch not in ARCHITECTURES:
        raise UnsupportedFormat(f"there are no Triton kernels for '{machine.name}'", next_move="Name another target: h200.")
    if (reason := missing()) is not None:
        raise UnsupportedFormat(reason, next_move="Install it: pip install triton.")
    return machine.arch


def require_cpu(name: str | None) -> Cpu:
    from attnopt.codegen.tvm.availability import missing
    from attnopt.codegen.tvm.cpu import host, named

    found = host() if name is None else named(name)
    if (reason := missing()) is not None:
        raise UnsupportedFormat(reason, next_move="Install it: pip install apache-tvm.")
    return found


def emit_kernels(opened: Opened, folder: str | Path, machine: str | Cpu, dtype: str | None) -> tuple[SiteKernel, ...]:
    """The files of one kernel for each distinct attention, in a folder that is made where it is missing."""
    from attnopt.codegen.triton import site_kernels as triton
    from attnopt.codegen.tvm import site_kernels as tvm

    sites = recognise(opened.host.graph).sites
    try:
        Path(folder).mkdir(exist_ok=True)
    except OSError as failure:
        raise OutputNotWritable(
            f"the folder '{folder}' cannot be made: {failure.strerror}", next_move="Choose another."
        ) from None
    if isinstance(machine, str):
        return triton.write_kernels(sites, machine, Path(folder), dtype)
    return tvm.write_kernels(sites, machine, Path(folder), dtype)
