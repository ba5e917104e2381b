"""Whether TVM can run here: it may be missing or broken, and then other kernels take over.

missing()   ->   "TVM is not installed, so its kernels are left out", or None where they run
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from pathlib import Path


@functools.cache
def missing() -> str | None:
    """One line that says why there are no kernels of TVM here; None where there are. Its compiler is not loaded for it."""
    try:
        if importlib.util.find_spec("tvm") is None or importlib.util.find_spec("tvm_ffi") is None:
            return "TVM is not installed, so its kernels are left out"
        load_runtime()
    except Exception as failure:  # whatever a broken installation throws: half a wheel, a library of another system
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        return f"TVM cannot be loaded, so its kernels are left out: {reason}"
    return None


@functools.cache
def load_runtime() -> None:
    """What compiled kernels call: TVM's runtime alone, which loads in a moment; the compiler takes a second."""
    from tvm_ffi.libinfo import load_lib_ctypes

    package = importlib.util.find_spec("tvm")
    places = [] if package is None else list(package.submodule_search_locations or ())
    folders = [Path(place) / "lib" for place in places]
    load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=[folder for folder in folders if folder.is_dir()])


@functools.cache
def version() -> str:
    """Of what compiles, without loading it."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as of

    try:
        return of("apache-tvm")
    except PackageNotFoundError:  # built from source
        return "unknown"


@functools.cache
def say_once(reason: str) -> None:
    """The one line where other kernels take over."""
    logging.getLogger("attnopt").warning(reason)
