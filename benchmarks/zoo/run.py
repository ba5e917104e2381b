"""Many model types, each in a process of its own with a time limit; what they measured is kept as it comes.

The parent imports the libraries once; each type runs in a fork, so a type that hangs or takes all memory ends alone.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from zoo.measure import Record, measured

Case = tuple[str, str]
LIMIT = 90  # seconds of processor time for one type, so that a busy machine loses none
MEMORY = 12 << 30  # bytes of address space beyond what the libraries take


def warm_up() -> None:
    """One small export, so that every fork starts with the compiler's modules loaded and its tables filled."""
    torch.set_num_threads(1)
    measured("bert", "eager")


def work(answer: Connection, function: Callable[..., Any], case: Case, limit: int) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    answer.send(function(*case))
    answer.close()


def forked(function: Callable[..., Any], cases: Sequence[Case], jobs: int = 1, limit: int = LIMIT) -> Iterator[tuple[Case, Any]]:
    """(case, what the function returns for it) as they finish; the text of how it ended where a process died."""
    context = multiprocessing.get_context("fork")
    waiting = list(cases)[::-1]
    running: dict[Connection, tuple[multiprocessing.process.BaseProcess, Case]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(theirs, function, case, limit), daemon=True)
            process.start()
            theirs.close()
            running[ours] = (process, case)
        for answer in wait(list(running)):
            process, case = running.pop(answer)
            try:
                yield case, answer.recv()
            except EOFError:
                process.join()
                yield case, ending(process.exitcode, limit)
            process.join()
            answer.close()


def ending(code: int | None, limit: int) -> str:
    return f"took longer than {limit} s" if code in (-signal.SIGXCPU, -signal.SIGKILL) else f"the process ended with code {code}"


def records(cases: Sequence[Case], jobs: int = 1) -> Iterator[Record]:
    """The record of each (type, attention)."""
    warm_up()
    for case, found in forked(measured, cases, jobs):
        yield found if isinstance(found, Record) else Record(*case, error=found)


def append(path: Path, record: Record) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def read(path: Path) -> list[Record]:
    """The records of a file, the last of each type and attention."""
    if not path.exists():
        return []
    lines = [Record(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return list({(r.model_type, r.attention): r for r in lines}.values())
