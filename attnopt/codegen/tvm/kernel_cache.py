"""TVM's kernels on disk: what each is asked for, and how it is kept (see codegen/kernel_cache).

    compiled("prefill", spec, form, tile, host(), lambda: emit(spec, form, tile, host()))   ->   Compiled, once for all processes

An entry holds the source and the library. It hangs on spec, form, tile, CPU and TVM's version.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from attnopt.codegen.kernel_cache import Format, Members, kept
from attnopt.codegen.tvm.availability import version
from attnopt.codegen.tvm.compile import Compiled, compile_source
from attnopt.codegen.tvm.cpu import Cpu
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

SOURCE, LIBRARY, FIGURES = "kernel.py", "kernel.library", "kernel.json"


def compiled(family: str, spec: AttentionSpec, form: Any, tile: Any, cpu: Cpu, emit: Callable[[], str]) -> Compiled | Refusal:
    """`compile_source` of what `emit` prints, from the cache where it has been asked before; form and tile are dataclasses."""
    asked = {
        "family": f"tvm-{family}", "spec": str(spec), "form": asdict(form), "tile": asdict(tile), "cpu": asdict(cpu), "tvm": version(),
    }  # fmt: skip
    return kept(asked, lambda: compile_source(emit(), cpu), FORMAT)


def members(made: Compiled) -> dict[str, bytes]:
    figures = json.dumps({"cpu": made.cpu, "form": made.form}, indent=2)
    return {SOURCE: made.source.encode(), LIBRARY: made.library, FIGURES: figures.encode()}


def restored(held: Members) -> Compiled:
    return Compiled(**json.loads(held[FIGURES]), source=held[SOURCE].decode(), library=held[LIBRARY])


FORMAT = Format(members, restored)
