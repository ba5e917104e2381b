"""Which tile a kernel gets: what was measured on this CPU where something was, else the first of the table.

    tune(parse("softmax scale(0.125) causal"), Form(64, 64, "float32"))   ->   Tile(48, 64, 4, 4), also for later kernels of its family

A family is what the best tile hangs on: how the mask cuts the keys (not at all, by a triangle, by a band), whether scores are changed,
dtype and widths. All tiles of the table are compiled and run in turn on random tensors; another than the first is kept where it is
faster by more than noise. Results stand in a file of the user's, named after the processor, and are forgotten with TVM's version.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from attnopt.codegen.prefill_form import Form, positive_scale
from attnopt.codegen.tvm.availability import version
from attnopt.codegen.tvm.compile import Compiled, loaded
from attnopt.codegen.tvm.cpu import Cpu, host
from attnopt.codegen.tvm.kernel_cache import compiled
from attnopt.codegen.tvm.prefill import emit
from attnopt.codegen.tvm.threads import follow_torch
from attnopt.codegen.tvm.tiles import MANY, Tile, fitting, narrowed, tiles
from attnopt.cost.target_file import config_folder, processor
from attnopt.ir.ranges import key_range
from attnopt.ir.spec import AttentionSpec, parse

NOISE = 0.03  # by how much a tile must be faster than the first of the table
HEADS, LENGTH = 2, 1024  # of what is run: a head's keys and values fill the second-level cache, not the last
ROUNDS, SECONDS = 25, 0.5  # for each tile, whichever comes first
REPRESENTATIVES = {"dense": "", "triangle": "causal", "band": "causal & window(256)"}


def chosen_tile(spec: AttentionSpec, form: Form, cpu: Cpu, queries: int = MANY) -> Tile:
    """The tile for a kernel of this CPU; queries: how many there are, MANY or more."""
    table = fitting(tiles(cpu, form), spec)
    found = measured(path()).get(family(spec, form)) if cpu == host() else None
    return narrowed(table, found if found in table else table[0], queries, cpu)


def tune(spec: AttentionSpec, form: Form) -> Tile:
    """Measure the family of a spec on this machine, for some seconds, and keep what is best."""
    mask, scores = mask_family(spec), bool(positive_scale(spec)[1])
    line = f"softmax scale({form.width**-0.5:.7g}) {'softcap(30.0)' if scores else ''} {REPRESENTATIVES[mask]}"
    plain = Form(form.width, form.value_width, form.dtype)
    table = tiles(host(), form)
    kernels = {tile: kernel for tile in table if (kernel := built(parse(line), plain, tile)) is not None}
    if table[0] not in kernels:
        return table[0]
    times = in_turn({tile: bound(kernel, plain) for tile, kernel in kernels.items()})
    best = min(times, key=times.__getitem__)
    tile = best if times[best] < (1 - NOISE) * times[table[0]] else table[0]
    keep(family(spec, form), tile)
    return tile


def built(spec: AttentionSpec, form: Form, tile: Tile) -> Callable[..., None] | None:
    made = compiled("prefill", spec, form, tile, host(), lambda: emit(spec, form, tile, host()))
    return loaded(made) if isinstance(made, Compiled) else None


def bound(kernel: Callable[..., None], form: Form) -> Callable[[], None]:
    """A call on random tensors."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, form.dtype)
    q, k, v = (
        torch.randn(1, HEADS, LENGTH, width, generator=generator).to(dtype)
        for width in (form.width, form.width, form.value_width)
    )
    o = torch.empty(1, HEADS, LENGTH, form.value_width, dtype=dtype)
    follow_torch()
    return lambda: kernel(q, k, v, o)


def in_turn(calls: dict[Tile, Callable[[], None]]) -> dict[Tile, float]:
    """Median seconds of each, on one thread those of this process alone."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    runs: dict[Tile, list[float]] = {tile: [] for tile in calls}
    until = time.perf_counter() + SECONDS * len(calls)
    for _ in range(ROUNDS):
        for tile, call in calls.items():
            started = clock()
            call()
            runs[tile].append(clock() - started)
        if time.perf_counter() > until:
            break
    return {tile: statistics.median(spent[1:] or spent) for tile, spent in runs.items()}  # the first warms caches


def family(spec: AttentionSpec, form: Form) -> str:
    scores = "scores" if positive_scale(spec)[1] else "plain"
    return f"prefill {mask_family(spec)} {scores} {form.dtype} {form.width} {form.value_width}"


def mask_family(spec: AttentionSpec) -> str:
    scope = key_range(spec.mask)
    return "dense" if not scope.bounded else "triangle" if not (scope.first and scope.end) else "band"


def path() -> Path:
    words: Sequence[str] = re.findall(r"[a-z0-9]+", processor().lower())
    return config_folder() / f"tvm-tiles-{'-'.join(words)}.json"


@functools.cache
def measured(place: Path) -> dict[str, Tile]:
    """What the file holds; nothing where there is none, or where it is not of this version."""
    try:
        held = json.loads(place.read_text(encoding="utf-8"))
        return {name: Tile(**tile) for name, tile in held["tiles"].items()} if held["tvm"] == version() else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def keep(name: str, tile: Tile) -> None:
    """Add one family to the file, which appears whole or not at all."""
    place = path()
    measured.cache_clear()
    held = {**measured(place), name: tile}
    text = json.dumps({"tvm": version(), "tiles": {key: asdict(value) for key, value in held.items()}}, indent=2)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=place.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, place)
    except OSError as failure:
        logging.getLogger("attnopt").warning("measured tiles are not kept: %s", failure.strerror or failure)
    measured.cache_clear()
