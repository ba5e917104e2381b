"""Changes to source text at the places that `ast` gives, so that every line that is not changed stays as it was written.

"f(a, b, c)", Edit over "b, "   ->   "f(a, c)"
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """Characters start … end - 1 become the text."""

    start: int
    end: int
    text: str


def applied(source: str, edits: Iterable[Edit]) -> str:
    """The source after all edits, none of which overlap: the first of those that do wins. Lines that became blank are dropped."""
    done: list[str] = []
    at = 0
    for edit in sorted(set(edits), key=lambda e: (e.start, -e.end)):
        if edit.start < at:
            continue
        done += [source[at : edit.start], edit.text]
        at = edit.end
        line, newline = "".join(done).rpartition("\n")[2], source.find("\n", at)
        inside = edit.end > edit.start and source[edit.end - 1] != "\n"  # whole lines leave none behind that is blank
        if inside and not edit.text and newline >= 0 and not (line + source[at:newline]).strip():
            joined = "".join(done)
            done, at = [joined[: len(joined) - len(line)]], newline + 1
    return "".join([*done, source[at:]])


def line_starts(source: str) -> list[int]:
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


def span(source: str, node: ast.AST, *, decorated: bool = False) -> tuple[int, int]:
    """Where a node stands. Columns of `ast` count bytes, so a line of code is ASCII; comments and docstrings need not be."""
    starts = line_starts(source)
    line, column = node.lineno, node.col_offset  # type: ignore[attr-defined]
    if decorated and node.decorator_list:  # type: ignore[attr-defined]
        line, column = node.decorator_list[0].lineno, 0  # type: ignore[attr-defined]
    return starts[line - 1] + column, starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]


def without_argument(source: str, start: int, end: int) -> tuple[int, int]:
    """The span of an argument or parameter with its default and one comma."""
    end = with_default(source, end)
    if source[end] == ",":
        end += 1
        while source[end] == " ":
            end += 1
        return start, end
    while source[start - 1] in " \n":
        start -= 1
    return (start - 1 if source[start - 1] == "," else start), end


def with_default(source: str, end: int) -> int:
    """Where a parameter ends with its default, which is a plain word or number here."""
    while source[end] not in ",)":
        end += 1
    return end


def blocks_of(source: str) -> Blocks:
    return Blocks(source, line_starts(source))


@dataclass(frozen=True)
class Blocks:
    """Statements as whole lines: bodies taken out of the statement around them."""

    source: str
    starts: list[int]

    def lines(self, node: ast.stmt) -> tuple[int, int]:
        """The lines of a statement, decorators too; of a function at the top also the blank lines before it."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        if isinstance(node, ast.FunctionDef):
            while first > 1 and not self.text(first - 1, first - 1).strip():
                first -= 1
        return self.starts[first - 1], self.starts[node.end_lineno]  # type: ignore[index]

    def text(self, first: int, last: int) -> str:
        return self.source[self.starts[first - 1] : self.starts[last]]

    def body(self, statements: list[ast.stmt], after: int, indent: int) -> str:
        """The lines of a body, those of comments above its first statement too, at this indent."""
        text = self.text(after + 1, statements[-1].end_lineno)  # type: ignore[arg-type]
        by = statements[0].col_offset - indent
        return "".join(line[by:] if line[:by].isspace() and line.strip() else line for line in text.splitlines(keepends=True))

    def inlined(self, loop: ast.For) -> str:
        """The body in place of the loop."""
        start, end = self.lines(loop)
        return self.source[:start] + self.body(loop.body, loop.lineno, loop.col_offset) + self.source[end:]

    def chosen(self, node: ast.If, truth: bool) -> str:
        """The branch that is taken in place of the `if`; an `elif` that is taken becomes `else`."""
        start, end = self.lines(node)
        chained = self.text(node.lineno, node.lineno).lstrip().startswith("elif")
        before, after = self.source[:start], self.source[end:]
        if truth:
            if chained:
                indent = " " * node.col_offset
                return f"{before}{indent}else:\n{self.body(node.body, node.lineno, node.body[0].col_offset)}{after}"
            return before + self.body(node.body, node.lineno, node.col_offset) + after
        if not node.orelse:
            return before + after
        last: int = node.body[-1].end_lineno  # type: ignore[assignment]
        branch = last + 1  # comments may stand above `else`; a template has none there
        following = self.text(branch, node.end_lineno)  # type: ignore[arg-type]
        if chained:  # what follows goes on with the chain
            return before + following + after
        if following.lstrip().startswith("elif"):
            return before + following.replace("elif", "if", 1) + after
        return before + self.body(node.orelse, branch, node.col_offset) + after
