"""Write the Triton kernels of an opened model: what `attnopt.kernels`, `Optimized.kernels` and the command line do alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attnopt.cost.target import load_target
from attnopt.errors import OutputNotWritable, UnsupportedFormat
from attnopt.opening import Opened
from attnopt.patterns import recognise

if TYPE_CHECKING:
    from attnopt.codegen.site_kernels import SiteKernel


def require_kernels(target: str) -> str:
    """The architecture that kernels for a target are compiled for. Raises UnknownTarget, or UnsupportedFormat where there are none."""
    from attnopt.codegen.triton.availability import missing
    from attnopt.codegen.triton.tiles import ARCHITECTURES

    machine, _ = load_target(target)
    if machine.arch not in ARCHITECTURES:
        raise UnsupportedFormat(f"there are no Triton kernels for '{machine.name}'", next_move="Name a target with a GPU: h200.")
    if (reason := missing()) is not None:
        raise UnsupportedFormat(reason, next_move="Install it: pip install triton.")
    return machine.arch


def emit_kernels(opened: Opened, folder: str | Path, architecture: str, dtype: str | None) -> tuple[SiteKernel, ...]:
    """The files of one kernel for each distinct attention, in a folder that is made where it is missing."""
    from attnopt.codegen.triton.site_kernels import write_kernels

    sites = recognise(opened.host.graph).sites
    try:
        Path(folder).mkdir(exist_ok=True)
    except OSError as failure:
        raise OutputNotWritable(
            f"the folder '{folder}' cannot be made: {failure.strerror}", next_move="Choose another."
        ) from None
    return write_kernels(sites, architecture, Path(folder), dtype)
