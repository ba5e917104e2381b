"""Compiled kernels on disk: what is read is what was written, whoever else writes, and a disk that fails costs time only."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import resource
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from attnopt.codegen import kernel_cache
from attnopt.codegen.kernel_cache import Format, kept, packed, read
from attnopt.ir.site import Refusal


@dataclass(frozen=True)
class Made:
    """What some compiler makes."""

    source: str
    binary: bytes
    registers: int


def members(made: Made) -> dict[str, bytes]:
    return {"kernel.py": made.source.encode(), "kernel.bin": made.binary, "registers": str(made.registers).encode()}


FORMAT = Format(members, lambda held: Made(held["kernel.py"].decode(), held["kernel.bin"], int(held["registers"])))
SMALL = Made("def attention():\n    …\n" * 20, bytes(range(256)), 168)
LINE = "kernels are compiled anew each time, because their cache cannot be used:"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path / "kernels"))
    kernel_cache.complain.cache_clear()
    return tmp_path / "kernels"


def never():
    raise AssertionError("it was compiled again")


def large(at: int) -> Made:
    """What every writer of a key makes: the same, and more than one block of a disk."""
    return replace(SMALL, binary=random.Random(at).randbytes(300_000), registers=at)


def test_what_is_kept_comes_back(folder):
    assert kept({"family": "test"}, lambda: SMALL, FORMAT) == SMALL
    assert kept({"family": "test"}, never, FORMAT) == SMALL
    refused = Refusal("it spills")
    assert kept({"family": "other"}, lambda: refused, FORMAT) is refused
    assert [path.suffix for path in folder.iterdir()] == [".zip"]


def test_everything_that_matters_makes_another_key(monkeypatch):
    question = {"family": "test", "spec": "softmax"}
    key = kernel_cache.digest(question)
    assert kernel_cache.digest(dict(reversed(question.items()))) == key
    assert kernel_cache.digest({**question, "spec": "softmax causal"}) != key
    monkeypatch.setattr(kernel_cache, "VERSION", "0")
    assert kernel_cache.digest(question) != key
    monkeypatch.undo()
    monkeypatch.setattr(kernel_cache, "sources", lambda: "changed")
    assert kernel_cache.digest(question) != key


def test_the_default_folder(monkeypatch):
    monkeypatch.delenv("ATTNOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert kernel_cache.folder() == Path("/somewhere/attnopt/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kernel_cache.folder() == Path.home() / ".cache" / "attnopt" / "kernels"


def test_no_damage_is_believed(tmp_path):
    """An entry that is cut off anywhere, or has one wrong byte, is refused or means the same."""
    content, path = packed(members(SMALL), "key"), tmp_path / "entry.zip"
    path.write_bytes(content)
    assert read(path, "key", FORMAT) == SMALL
    assert read(path, "another", FORMAT) is None
    generator = random.Random(0)
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at])
        assert read(path, "key", FORMAT) is None
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ generator.randrange(1, 256)]) + content[at + 1 :])
        assert read(path, "key", FORMAT) in (None, SMALL)


def test_a_damaged_entry_is_made_again(folder):
    kept({"family": "test"}, lambda: SMALL, FORMAT)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert kept({"family": "test"}, lambda: SMALL, FORMAT) == SMALL
    assert path.read_bytes()[:4] == content[:4]
    assert kept({"family": "test"}, never, FORMAT) == SMALL


def write_and_read(seed: int) -> int:
    """How often an entry was not what it should be, while others write the same ones."""
    generator, wrong = random.Random(seed), 0
    for _ in range(40):
        at = generator.randrange(3)
        if generator.random() < 0.3:  # as if it had been deleted
            for path in kernel_cache.folder().glob("*.zip"):
                path.unlink(missing_ok=True)
        wrong += kept({"family": "race", "at": at}, lambda at=at: large(at), FORMAT) != large(at)
    return wrong


def test_several_writers_at_once(folder):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(write_and_read, range(4)) == [0, 0, 0, 0]
    assert {path.suffix for path in folder.iterdir()} <= {".zip"}
    for at in range(3):
        assert kept({"family": "race", "at": at}, lambda at=at: large(at), FORMAT) == large(at)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path / "file" / "kernels"))
    with caplog.at_level(logging.WARNING, "attnopt"):
        assert kept({"family": "test"}, lambda: SMALL, FORMAT) == SMALL
        assert kept({"family": "test"}, lambda: SMALL, FORMAT) == SMALL
    assert caplog.messages == [f"{LINE} Not a directory. ATTNOPT_CACHE names another folder"]


def without_permission(folder, answer):
    if os.geteuid() == 0:  # permission bits say nothing to root
        os.setuid(65534)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("attnopt").addHandler(handler)
    os.environ["ATTNOPT_CACHE"] = folder
    answer.put([kept({"family": "test", "at": at}, lambda at=at: large(at), FORMAT) == large(at) for at in range(2)] + said)


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
    made = kept({"family": "test"}, lambda: large(1), FORMAT)
    answer.put((made == large(1), [path.name for path in kernel_cache.folder().iterdir()]))


def test_a_disk_that_is_full(folder):
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=until_full, args=(answer,))
    process.start()
    process.join()
    assert answer.get() == (True, [])
    assert kept({"family": "test"}, lambda: large(1), FORMAT) == large(1)
