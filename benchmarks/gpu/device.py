"""Which GPU this is, and with what software: the head of every result."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from typing import Any

import torch

import attnopt
from attnopt.codegen.triton.availability import interpreted, missing


def unusable() -> str | None:
    """Why nothing can be measured here; None where it can."""
    if (reason := missing()) is not None:
        return reason
    return None if torch.cuda.is_available() else "there is no GPU here"


def described(device: torch.device) -> dict[str, Any]:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:  # builds for AMD have other names
        triton = "unknown"
    versions = {"attnopt": attnopt.__version__, "torch": torch.__version__, "triton": triton, "python": platform.python_version()}
    if device.type != "cuda":
        return {"name": "Triton's interpreter" if interpreted() else "CPU", "driver": "", "versions": versions}
    about = torch.cuda.get_device_properties(device)
    versions |= {"cuda": str(torch.version.cuda or torch.version.hip), "cudnn": str(torch.backends.cudnn.version())}
    return {
        "name": about.name,
        "memory_gib": round(about.total_memory / 2**30, 1),
        "units": about.multi_processor_count,
        "driver": driver(),
        "versions": versions,
    }


def driver() -> str:
    """The version of NVIDIA's driver; empty where its tool says nothing."""
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
