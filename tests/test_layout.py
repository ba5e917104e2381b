"""The house is in order: folders and tuples agree, names derive from each other, links and imports point right."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest

import attnopt
from attnopt.codegen import LOWERINGS
from attnopt.passes import ALL

PACKAGE = Path(attnopt.__file__).resolve().parent
ROOT = PACKAGE.parent
LONGEST = 400  # lines of a file; one that must be longer is named here with its reason
FORBIDDEN_NAMES = {"utils", "util", "helper", "helpers", "common", "misc"}
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SHIPPED = sorted(f for f in PACKAGE.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc"))


def kebab(class_name: str) -> str:
    """FuseAttention -> fuse-attention, DynamicInt8 -> dynamic-int8."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", class_name).lower()


def units(folder: Path) -> set[str]:
    """Modules of a folder, as dotted names."""
    files = (f for f in folder.glob("*.py") if f.name != "__init__.py")
    return {".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files}


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_kebab():
    assert [kebab(n) for n in ("FuseAttention", "DynamicInt8", "Flex")] == ["fuse-attention", "dynamic-int8", "flex"]


def test_every_pass_in_the_folder_is_in_the_tuple():
    shared = "edits"  # how graphs are changed; every other folder is a family of passes
    families = (f for f in (PACKAGE / "passes").iterdir() if (f / "__init__.py").exists() and f.name != shared)
    assert {type(p).__module__ for p in ALL} == set().union(*(units(family) for family in families))


@pytest.mark.parametrize("rewrite", ALL, ids=lambda p: p.name)
def test_names_of_a_pass_derive_from_each_other(rewrite):
    assert rewrite.name == kebab(type(rewrite).__name__)
    assert rewrite.name == type(rewrite).__module__.rpartition(".")[2].replace("_", "-")
    assert (type(rewrite).__doc__ or "").strip()
    assert rewrite == type(rewrite)()  # frozen, with defaults


def test_names_of_passes_and_lowerings_are_unique():
    assert len({p.name for p in ALL}) == len(ALL)
    assert len({x.name for x in LOWERINGS}) == len(LOWERINGS)


def test_every_lowering_in_the_folder_is_in_the_tuple():
    folders = (
        PACKAGE / "codegen" / "library",
        PACKAGE / "codegen" / "triton" / "lowerings",
        PACKAGE / "codegen" / "tvm" / "lowerings",
    )
    assert {type(x).__module__ for x in LOWERINGS} == set().union(*map(units, folders))


@pytest.mark.parametrize("lowering", LOWERINGS, ids=lambda x: x.name)
def test_a_lowering_is_named_after_its_file(lowering):
    assert type(lowering).__module__.rpartition(".")[2] == kebab(type(lowering).__name__).replace("-", "_")


@pytest.mark.parametrize("room", ["passes", "patterns", "codegen"])
def test_the_doors_are_relative_links(room):
    door = ROOT / room
    assert door.is_symlink()
    assert door.readlink() == Path("attnopt") / room
    assert door.resolve() == PACKAGE / room


def test_no_file_is_too_long():
    lengths = {str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in [*FILES, *TESTS]}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


def test_files_say_what_they_are():
    assert [f.name for f in [*FILES, *TESTS] if f.stem in FORBIDDEN_NAMES] == []
    assert [f.name for f in FILES if not ast.get_docstring(ast.parse(f.read_text(encoding="utf-8")))] == []


def test_every_folder_is_a_package():
    assert {f for f in {f.parent for f in FILES} if not (f / "__init__.py").exists()} == set()


def test_only_hosts_know_torch_fx():
    """import-linter cannot forbid a part of another package, so this stands beside its contracts."""
    outside = [f for f in FILES if PACKAGE / "hosts" not in f.parents]
    assert {f.name for f in outside if any(f"{name}.".startswith("torch.fx.") for name in imported(f))} == set()


def test_data_files_are_shipped():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["attnopt"]
    assert {f for f in SHIPPED if not any(f.relative_to(PACKAGE).match(p) for p in patterns)} == set()
    assert (PACKAGE / "py.typed").exists()


def test_public_names_are_there():
    assert all(getattr(attnopt, name) is not None for name in attnopt.__all__)


def test_every_module_imports():
    """Not __main__, which runs the command, nor templates of TVM's kernels, which are read as text and need their holes filled."""
    templates = PACKAGE / "codegen" / "tvm" / "kernels"
    for path in FILES:
        if path.parent == templates and path.name != "__init__.py":
            ast.parse(path.read_text(encoding="utf-8"))
        elif path != PACKAGE / "__main__.py":
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
