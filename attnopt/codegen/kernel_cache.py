"""Compiled kernels on disk, so that one process compiles for all that come after it.

    kept({"family": "prefill", "spec": …}, make, FORMAT)   ->   ~/.cache/attnopt/kernels/3f…9a.zip, written or read

The name of an entry is a digest of all that the result depends on: the question, which holds family, spec, form, machine, tiles,
settings and the versions of its compiler, and besides it the versions of torch and attnopt and attnopt's own sources. An entry is a zip
file that holds what was made as members. It is written beside its place and then renamed, so readers see all of it or nothing, however
many write; one that is damaged fails its checksums and is made again.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

import attnopt
from attnopt.ir.site import Refusal
from attnopt.version import VERSION

FOLDER = "ATTNOPT_CACHE"
KEY = "key"  # a member: an entry under a false name is not believed
# What a torn or altered zip file raises; NotImplementedError and RuntimeError are compression and encryption that it never had.
DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, ValueError, TypeError, NotImplementedError, RuntimeError,
    OSError, OverflowError,
)  # fmt: skip
Made = TypeVar("Made")
Members = Mapping[str, bytes]


@dataclass(frozen=True)
class Format(Generic[Made]):
    """How what a compiler made is written as named members, and read back; `read` raises one of DAMAGED where they are not whole."""

    write: Callable[[Made], Members]
    read: Callable[[Members], Made]


def kept(question: Mapping[str, object], make: Callable[[], Made | Refusal], form: Format[Made]) -> Made | Refusal:
    """The entry for a question, which is made where it is missing or damaged. Refusals are not kept: it may have been the disk."""
    key = digest(question)
    try:
        path = folder() / f"{key}.zip"
        if (found := read(path, key, form)) is not None:
            return found
    except (OSError, RuntimeError) as failure:  # no home, no permission, not a folder
        complain(getattr(failure, "strerror", None) or str(failure))
        return make()
    made = make()
    if not isinstance(made, Refusal):
        try:
            store(path, packed(form.write(made), key))
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
    whole = {"question": question, "torch": torch.__version__, "attnopt": VERSION, "sources": sources()}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@functools.cache
def sources() -> str:
    """attnopt's own files: who changes the generator without a new version must not be given what the old one made."""
    found = hashlib.sha256()
    for path in sorted(Path(attnopt.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def packed(members: Members, key: str) -> bytes:
    """An entry as the bytes of a zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in {**members, KEY: key.encode()}.items():
            file.writestr(name, content)
    return buffer.getvalue()


def read(path: Path, key: str, form: Format[Made]) -> Made | None:
    """The entry, or None where there is none that is whole. Raises OSError where it cannot be read."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            members = {name: file.read(name) for name in file.namelist()}  # each against its checksum
        return form.read(members) if members[KEY] == key.encode() else None
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
