"""Compiled kernels on disk: what is read is what was written, whoever else writes, and a disk that fails costs time only."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from attnopt.codegen.triton import kernel_cache
from attnopt.codegen.triton.compile import Compiled
from attnopt.codegen.triton.kernel_cache import compiled, kept, packed, read
from attnopt.codegen.triton.prefill import Form
from attnopt.codegen.triton.tiles import Tile
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse

SMALL = Compiled("sm_80", Tile(64, 32, 4, 2), "def attention():\n    …\n", ".version 8.0\n", bytes(range(256)), 168, 0, 98304)
SPEC, FORM = parse("softmax scale(0.25) causal"), Form(16, 16)
LINE = "kernels are compiled anew each time, because their cache cannot be used:"
SECOND = """
import sys, triton
from attnopt.codegen.triton import kernel_cache
from attnopt.codegen.triton.triton_attention import kernel
triton.compile = triton.compiler.compile = None  # whoever calls them fails
from attnopt.codegen.triton.prefill import Form
from attnopt.ir.spec import parse
made = kernel_cache.compiled(parse("softmax scale(0.25) causal"), Form(16, 16), "sm_80")
print(made.registers, made.source.count("tl.dot"), kernel(parse("softmax scale(0.25) causal"), Form(16, 16), "sm_80").NUM_WARPS)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path / "kernels"))
    kernel_cache.complain.cache_clear()
    return tmp_path / "kernels"


def never():
    raise AssertionError("it was compiled again")


def large(at: int) -> Compiled:
    """What every writer of a key makes: the same, and more than one block of a disk."""
    return replace(SMALL, binary=random.Random(at).randbytes(300_000), registers=at)


def test_the_second_process_does_not_compile(folder):
    made = compiled(SPEC, FORM, "sm_80")
    assert isinstance(made, Compiled)
    assert len(list(folder.iterdir())) == 1
    assert compiled(SPEC, FORM, "sm_80") == made
    told = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout.split() == [str(made.registers), str(made.source.count("tl.dot")), str(made.tile.num_warps)]


def test_what_is_kept_comes_back(folder):
    assert kept({"family": "test"}, lambda: SMALL) == SMALL
    assert kept({"family": "test"}, never) == SMALL
    assert asdict(kept({"family": "test"}, never)) == asdict(SMALL)
    refused = Refusal("it spills")
    assert kept({"family": "other"}, lambda: refused) is refused
    assert [path.suffix for path in folder.iterdir()] == [".zip"]


def test_everything_that_matters_makes_another_key(monkeypatch):
    question = {"family": "test", "spec": "softmax"}
    key = kernel_cache.digest(question)
    assert kernel_cache.digest(dict(reversed(question.items()))) == key
    assert kernel_cache.digest({**question, "spec": "softmax causal"}) != key
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    assert kernel_cache.digest(question) == key
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert kernel_cache.digest(question) != key
    monkeypatch.undo()
    monkeypatch.setattr(kernel_cache, "versions", lambda: {"triton": "3.6.0"})
    assert kernel_cache.digest(question) != key


def test_the_default_folder(monkeypatch):
    monkeypatch.delenv("ATTNOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert kernel_cache.folder() == Path("/somewhere/attnopt/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kernel_cache.folder() == Path.home() / ".cache" / "attnopt" / "kernels"


def test_no_damage_is_believed(tmp_path):
    """An entry that is cut off anywhere, or has one wrong byte, is refused or means the same."""
    content, path = packed(SMALL, "key"), tmp_path / "entry.zip"
    path.write_bytes(content)
    assert read(path, "key") == SMALL
    assert read(path, "another") is None
    generator = random.Random(0)
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at])
        assert read(path, "key") is None
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ generator.randrange(1, 256)]) + content[at + 1 :])
        assert read(path, "key") in (None, SMALL)


def test_a_damaged_entry_is_made_again(folder):
    kept({"family": "test"}, lambda: SMALL)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert kept({"family": "test"}, lambda: SMALL) == SMALL
    assert path.read_bytes()[:4] == content[:4]
    assert kept({"family": "test"}, never) == SMALL


def write_and_read(seed: int) -> int:
    """How often an entry was not what it should be, while others write the same ones."""
    generator, wrong = random.Random(seed), 0
    for _ in range(40):
        at = generator.randrange(3)
        if generator.random() < 0.3:  # as if it had been deleted
            for path in kernel_cache.folder().glob("*.zip"):
                path.unlink(missing_ok=True)
        wrong += kept({"family": "race", "at": at}, lambda at=at: large(at)) != large(at)
    return wrong


def test_several_writers_at_once(folder):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(write_and_read, range(4)) == [0, 0, 0, 0]
    assert {path.suffix for path in folder.iterdir()} <= {".zip"}
    for at in range(3):
        assert kept({"family": "race", "at": at}, lambda at=at: large(at)) == large(at)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path / "file" / "kernels"))
    with caplog.at_level(logging.WARNING, "attnopt"):
        assert kept({"family": "test"}, lambda: SMALL) == SMALL
        assert kept({"family": "test"}, lambda: SMALL) == SMALL
    assert caplog.messages == [f"{LINE} Not a directory. ATTNOPT_CACHE names another folder"]


def without_permission(folder, answer):
    if os.geteuid() == 0:  # permission bits say nothing to root
        os.setuid(65534)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("attnopt").addHandler(handler)
    os.environ["ATTNOPT_CACHE"] = folder
    answer.put([kept({"family": "test", "at": at}, lambda at=at: large(at)) == large(at) for at in range(2)] + said)


def test_a_folder_that_is_read_only_is_one_line():
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        process = context.Process(target=without_permission, args=(folder, answer))
        process.start()
        process.join()
        first, second, said = answer.get()
        assert (first, second) == (True, True)
        assert said == f"{LINE} Permission denied. ATTNOPT_CACHE names another folder"
        assert os.listdir(folder) == []


def until_full(answer):
    """A limit on the size of files fails a write in the middle, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    made = kept({"family": "test"}, lambda: large(1))
    answer.put((made == large(1), [path.name for path in kernel_cache.folder().iterdir()]))


def test_a_disk_that_is_full(folder):
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=until_full, args=(answer,))
    process.start()
    process.join()
    assert answer.get() == (True, [])
    assert kept({"family": "test"}, lambda: large(1)) == large(1)
