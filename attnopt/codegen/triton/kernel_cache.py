"""Compiled kernels on disk, so that one process compiles for all that come after it.

    compiled(spec, form, "sm_90")   ->   ~/.cache/attnopt/kernels/3f…9a.zip, written or read

The name of an entry is a digest of all that the result depends on: family, spec, form (the widths, dtypes and outputs that a kernel is
compiled for; lengths, heads and batch are read when it runs), architecture, tiles, the versions of triton, torch and attnopt,
attnopt's own sources and Triton's settings. An entry is a zip file that holds source, assembly, binary and figures as they were
emitted. It is written beside its place and then renamed, so readers see all of it or nothing, however many write; one that is
damaged fails its checksums and is made again.

The folder is named by ATTNOPT_CACHE; else it is attnopt/kernels in XDG_CACHE_HOME, or in ~/.cache. It may be deleted at any time.
Where it cannot be written, kernels are compiled each time, and one line says so.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

import attnopt
from attnopt.codegen.triton import decode_compile
from attnopt.codegen.triton.compile import Compiled, compile_best
from attnopt.codegen.triton.configurations import configurations
from attnopt.codegen.triton.decode_tiles import decode_tiles
from attnopt.codegen.triton.prefill import Form
from attnopt.codegen.triton.tiles import Tile
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.version import VERSION

FOLDER = "ATTNOPT_CACHE"
MEMBERS = ("kernel.py", "kernel.asm", "kernel.bin", "kernel.json")
# What a torn or altered zip file raises; NotImplementedError and RuntimeError are compression and encryption that it never had.
DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, ValueError, TypeError, NotImplementedError, RuntimeError,
    OSError, OverflowError,
)  # fmt: skip
PLACES = ("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_DUMP_DIR", "TRITON_OVERRIDE_DIR")  # settings that change no kernel


def compiled(spec: AttentionSpec, form: Form, architecture: str) -> Compiled | Refusal:
    """`compile.compile_best`, from the cache where it has been asked before."""
    tried = configurations(spec, form, architecture)
    return kept(question("prefill", spec, form, architecture, tried), lambda: compile_best(spec, form, architecture))


def compiled_decode(spec: AttentionSpec, form: Form, architecture: str, block_q: int = 16) -> Compiled | Refusal:
    """`decode_compile.compile_best`, from the cache where it has been asked before."""
    tried = decode_tiles(architecture, spec, form, block_q)
    asked = question("decode", spec, form, architecture, tried)
    return kept(asked, lambda: decode_compile.compile_best(spec, form, architecture, block_q))


def compiled_merge(spec: AttentionSpec, form: Form, architecture: str, tile: Tile) -> Compiled | Refusal:
    """`decode_compile.compile_merge`, from the cache where it has been asked before."""
    asked = question("merge", spec, form, architecture, [tile])
    return kept(asked, lambda: decode_compile.compile_merge(spec, form, architecture, tile))


def question(family: str, spec: AttentionSpec, form: Form, architecture: str, tried: Iterable[Tile]) -> dict[str, object]:
    """What a kernel is asked for, as JSON can write it."""
    return {
        "family": family, "spec": str(spec), "form": asdict(form), "architecture": architecture,
        "tiles": [asdict(tile) for tile in tried],
    }  # fmt: skip


def kept(question: Mapping[str, object], make: Callable[[], Compiled | Refusal]) -> Compiled | Refusal:
    """The entry for a question, which is made where it is missing or damaged. Refusals are not kept: it may have been the disk."""
    key = digest(question)
    try:
        path = folder() / f"{key}.zip"
        if (found := read(path, key)) is not None:
            return found
    except (OSError, RuntimeError) as failure:  # no home, no permission, not a folder
        complain(getattr(failure, "strerror", None) or str(failure))
        return make()
    made = make()
    if isinstance(made, Compiled):
        try:
            store(path, packed(made, key))
        except OSError as failure:
            complain(failure.strerror or str(failure))
    return made


def folder() -> Path:
    named = os.environ.get(FOLDER)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "attnopt" / "kernels"


def digest(question: Mapping[str, object]) -> str:
    settings = {name: value for name, value in os.environ.items() if name.startswith("TRITON_") and name not in PLACES}
    whole = {**question, "versions": versions(), "sources": sources(), "settings": settings}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__, "attnopt": VERSION}


@functools.cache
def sources() -> str:
    """attnopt's own files: who changes the generator without a new version must not be given what the old one made."""
    found = hashlib.sha256()
    for path in sorted(Path(attnopt.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def packed(made: Compiled, key: str) -> bytes:
    """An entry as the bytes of a zip file; the key is inside too, so that an entry under a false name is not believed."""
    figures = asdict(made)
    texts = [figures.pop(name) for name in ("source", "assembly", "binary")]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in zip(MEMBERS, [*texts, json.dumps({"key": key, **figures}, indent=2)], strict=True):
            file.writestr(name, content)
    return buffer.getvalue()


def read(path: Path, key: str) -> Compiled | None:
    """The entry, or None where there is none that is whole. Raises OSError where it cannot be read."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            source, assembly, binary, figures = (file.read(name) for name in MEMBERS)  # each against its checksum
        held = json.loads(figures)
        tile = Tile(**held.pop("tile"))
        if held.pop("key") != key:
            return None
        return Compiled(**held, tile=tile, source=source.decode(), assembly=assembly.decode(), binary=binary)
    except DAMAGED:
        return None


def store(path: Path, content: bytes) -> None:
    """Write beside the place, then rename: of several writers the last one wins, and all have written the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


@functools.cache
def complain(reason: str) -> None:
    line = "kernels are compiled anew each time, because their cache cannot be used: %s. %s names another folder"
    logging.getLogger("attnopt").warning(line, reason, FOLDER)
