"""Triton's kernels on disk: what each is asked for, and how it is kept (see codegen/kernel_cache).

    compiled(spec, form, "sm_90")   ->   the kernel that compile.compile_best makes, compiled once for all processes

An entry holds source, assembly, binary and figures as they were emitted. It hangs on spec, form (the widths, dtypes and outputs that a
kernel is compiled for; lengths, heads and batch are read when it runs), architecture, tiles, Triton's version and its settings.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from dataclasses import asdict

from attnopt.codegen.kernel_cache import Format, Members, kept
from attnopt.codegen.triton import decode_compile
from attnopt.codegen.triton.compile import Compiled, compile_best
from attnopt.codegen.triton.configurations import configurations
from attnopt.codegen.triton.decode_tiles import decode_tiles
from attnopt.codegen.triton.prefill import Form
from attnopt.codegen.triton.tiles import Tile
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

MEMBERS = {"source": "kernel.py", "assembly": "kernel.asm", "binary": "kernel.bin"}
FIGURES = "kernel.json"
PLACES = ("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_DUMP_DIR", "TRITON_OVERRIDE_DIR")  # settings that change no kernel


def compiled(spec: AttentionSpec, form: Form, architecture: str) -> Compiled | Refusal:
    """`compile.compile_best`, from the cache where it has been asked before."""
    tried = configurations(spec, form, architecture)
    return kept(question("prefill", spec, form, architecture, tried), lambda: compile_best(spec, form, architecture), FORMAT)


def compiled_decode(spec: AttentionSpec, form: Form, architecture: str, block_q: int = 16) -> Compiled | Refusal:
    """`decode_compile.compile_best`, from the cache where it has been asked before."""
    tried = decode_tiles(architecture, spec, form, block_q)
    asked = question("decode", spec, form, architecture, tried)
    return kept(asked, lambda: decode_compile.compile_best(spec, form, architecture, block_q), FORMAT)


def compiled_merge(spec: AttentionSpec, form: Form, architecture: str, tile: Tile) -> Compiled | Refusal:
    """`decode_compile.compile_merge`, from the cache where it has been asked before."""
    asked = question("merge", spec, form, architecture, [tile])
    return kept(asked, lambda: decode_compile.compile_merge(spec, form, architecture, tile), FORMAT)


def question(family: str, spec: AttentionSpec, form: Form, architecture: str, tried: Iterable[Tile]) -> dict[str, object]:
    """What a kernel is asked for, as JSON can write it."""
    return {
        "family": family, "spec": str(spec), "form": asdict(form), "architecture": architecture,
        "tiles": [asdict(tile) for tile in tried], "triton": version(), "settings": settings(),
    }  # fmt: skip


@functools.cache
def version() -> str:
    import triton

    found: str = triton.__version__
    return found


def settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("TRITON_") and name not in PLACES}


def members(made: Compiled) -> dict[str, bytes]:
    figures = asdict(made)
    contents = {member: figures.pop(name) for name, member in MEMBERS.items()}
    contents[FIGURES] = json.dumps(figures, indent=2)
    return {member: x if isinstance(x, bytes) else x.encode() for member, x in contents.items()}


def restored(held: Members) -> Compiled:
    figures = json.loads(held[FIGURES])
    source, assembly, binary = (held[member] for member in MEMBERS.values())
    tile = Tile(**figures.pop("tile"))
    return Compiled(**figures, tile=tile, source=source.decode(), assembly=assembly.decode(), binary=binary)


FORMAT = Format(members, restored)
