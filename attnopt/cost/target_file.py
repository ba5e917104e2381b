"""The measured target of this machine: where its file lies, and how it is written.

    ~/.config/attnopt/cpu-amd-epyc-2-threads.toml

The folder is that of the environment variable ATTNOPT_CONFIG where it is set, else `attnopt` in XDG_CONFIG_HOME, in APPDATA, or in
~/.config. The name holds the processor and the number of threads, so that a home that several machines share keeps one file for each.
A file appears whole or not at all.
"""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from attnopt.errors import OutputNotWritable

VARIABLE = "ATTNOPT_CONFIG"
PROCESSORS = Path("/proc/cpuinfo")


def config_folder() -> Path:
    if given := os.environ.get(VARIABLE):
        return Path(given)
    home = os.environ.get("XDG_CONFIG_HOME") or os.environ.get("APPDATA")
    return (Path(home) if home else Path.home() / ".config") / "attnopt"


def processor(table: Path = PROCESSORS) -> str:
    """What the system calls its processor."""
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine() or "unknown")


def measured_path(folder: Path | None = None) -> Path:
    """Where the file of this machine lies, or would."""
    words = re.findall(r"[a-z0-9]+", f"cpu {processor()} {torch.get_num_threads()} threads".lower())
    return (folder or config_folder()) / ("-".join(words) + ".toml")


def as_toml(data: Mapping[str, Any], prefix: str = "") -> str:
    """Plain values first, then a table for each mapping; numbers as Python writes them, which reads back to the same."""
    lines = [f"{key} = {written(value)}" for key, value in data.items() if not isinstance(value, Mapping)]
    for key, value in data.items():
        if isinstance(value, Mapping):
            name = f"{prefix}{key}"
            plain = any(not isinstance(v, Mapping) for v in value.values())
            lines += ["", f"[{name}]"] * plain + [as_toml(value, f"{name}.")]
    return "\n".join(lines)


def written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def target_data(target: Any) -> dict[str, Any]:
    """The fields of a target that its file holds: all that are not empty, and neither its name nor what the system tells anyway."""
    held = {f.name: getattr(target, f.name) for f in fields(target) if f.name not in ("name", "memory", "shared_memory", "cache")}
    held["efficiencies"] = {name: asdict(e) for name, e in target.efficiencies.items()}
    return {name: value for name, value in held.items() if value not in ("", 0, 0.0, (), {})}


def save(target: Any, folder: Path | None = None) -> Path:
    """Write the file of this machine, whole or not at all. Raises OutputNotWritable."""
    path = measured_path(folder)
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False, encoding="utf-8") as file:
            partial = Path(file.name)
            file.write(as_toml(target_data(target)) + "\n")
        os.replace(partial, path)
    except OSError as failure:
        raise OutputNotWritable(
            f"the target file '{path}' cannot be written: {failure.strerror}", next_move=f"Set {VARIABLE} to another folder."
        ) from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    return path
