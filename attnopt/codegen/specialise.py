"""Specialise a kernel template by its source text: what a constant decides is written out, what nothing reads any more is left out.

    if CAUSAL:                            CAUSAL = False        b_s = tl.dot(b_q, b_k)
        b_s = tl.where(k <= q, b_s, x)         ->
    else:
        b_s = tl.dot(b_q, b_k)

`ast` only tells where things stand; lines are kept as they are written, comments with them. Each step is a function from text to
text that makes all its changes and is repeated until nothing changes.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnopt.codegen.source_edits import Edit, applied, blocks_of, span, with_default, without_argument

Value = bool | int | float | str


@dataclass(frozen=True)
class Slot:
    """A name of the template that stands for any number of parameters, and for what is passed to them."""

    name: str
    parameters: tuple[str, ...]
    arguments: tuple[str, ...]


def specialise(source: str, values: Mapping[str, Value], holes: Mapping[str, str], slots: Sequence[Slot], keep: str) -> str:
    """The template with constants set, holes filled and slots written out; `keep` is the function that users call.

    holes: the new source of functions of the template, by name, with the parameters that they have there.
    """
    decided = dict(values)
    text = fill(assign(source, values), holes)
    text = "".join(repeated(part, lambda t: decide(t, decided)) for part in statements(text))
    for slot in slots:
        text = written_out(text, slot)
    return tidy(repeated(text, lambda t: pruned(t, keep)))


def tidy(text: str) -> str:
    """Two blank lines before a function, none doubled elsewhere, no blanks at the end of a line."""
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    text = re.sub(r"\n\n\n+", "\n\n", text)
    return re.sub(r"\n+((?:@[^\n]*\n)*def )", r"\n\n\n\1", text)


def repeated(text: str, step: Callable[[str], str]) -> str:
    while (changed := step(text)) != text:
        text = changed
    return text


def statements(text: str) -> Iterator[str]:
    """The text cut before each function, so that a step reads as little of it as it changes."""
    cuts = [m.start() for m in re.finditer(r"^(?:@.*\n)*def ", text, re.MULTILINE)]
    for start, end in itertools.pairwise([0, *cuts, len(text)]):
        yield text[start:end]


def assign(source: str, values: Mapping[str, Value]) -> str:
    """Set constants of the module: `NAME = tl.constexpr(old)` or `NAME = old`."""
    edits = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in values:
            held = node.value.args[0] if isinstance(node.value, ast.Call) else node.value
            edits.append(Edit(*span(source, held), written(values[node.targets[0].id])))
    return applied(source, edits)


def written(value: Value) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def fill(source: str, holes: Mapping[str, str]) -> str:
    edits = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in holes:
            edits.append(Edit(*span(source, node, decorated=True), holes[node.name].strip("\n")))
    return applied(source, edits)


def decide(source: str, values: dict[str, Value]) -> str:
    """Write out each outermost `if` whose test is known, and `for` over one known number, which then stands for its name.

    Keyword arguments that are known to be False go, and terms that are zero, where nothing else is left to decide.
    """
    found: list[tuple[ast.If | ast.For, bool]] = []
    edits: list[Edit] = []
    inside = 0  # the last line of what is decided already
    for node in decidable(ast.parse(source)):
        if isinstance(node, ast.keyword):
            if isinstance(node.value, ast.Name) and values.get(node.value.id) is False:
                edits.append(Edit(*without_argument(source, *span(source, node)), ""))
        elif isinstance(node, ast.BinOp):
            if (same := without_zero(source, node)) is not None:
                edits.append(Edit(*span(source, node), same))
        elif node.lineno <= inside:
            continue
        elif isinstance(node, ast.If) and (left := without_known(source, node.test, values)) is not None:
            edits.append(Edit(*span(source, node.test), left))
        elif isinstance(node, ast.If) and (known := truth(node.test, values)) is not None:
            found.append((node, known))
            inside = node.end_lineno or 0
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name) and (only := single(node, values)) is not None:
            values[node.target.id] = only
            if named := [
                n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == node.target.id and n is not node.target
            ]:
                return applied(source, [Edit(*span(source, n), str(only)) for n in named])
            found.append((node, True))
            inside = node.end_lineno or 0
    if not found:
        return applied(source, edits)
    for node, known in reversed(found):  # from the last line up, so that what stands above stays where it is
        blocks = blocks_of(source)
        source = blocks.chosen(node, known) if isinstance(node, ast.If) else blocks.inlined(node)
    return source


def decidable(tree: ast.Module) -> list[Any]:
    """What may be decided, in the order of the lines."""
    found = [node for node in ast.walk(tree) if isinstance(node, (ast.If, ast.For, ast.keyword, ast.BinOp))]
    return sorted(found, key=lambda node: (node.lineno, node.col_offset))


def truth(test: ast.expr, values: Mapping[str, Value]) -> bool | None:
    """What a test is, where the constants say it: names, numbers, not, and, or, comparison with a literal."""
    if isinstance(test, ast.Constant):
        return bool(test.value)
    if isinstance(test, ast.Name):
        return bool(values[test.id]) if test.id in values else None
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = truth(test.operand, values)
        return None if inner is None else not inner
    if isinstance(test, ast.BoolOp):
        parts = [truth(part, values) for part in test.values]
        absorbing = isinstance(test.op, ast.Or)
        return absorbing if absorbing in parts else None if None in parts else not absorbing
    if isinstance(test, ast.Compare) and isinstance(test.left, ast.Name) and test.left.id in values:
        (op,), (right,) = test.ops, test.comparators
        if isinstance(op, ast.Eq) and isinstance(right, ast.Constant):
            return values[test.left.id] == right.value
    return None


def without_known(source: str, test: ast.expr, values: Mapping[str, Value]) -> str | None:
    """`A and x` as x where A is known to be true, `A or x` where it is false; None where all parts are open, or none."""
    if not isinstance(test, ast.BoolOp) or truth(test, values) is not None:
        return None
    parts = [part for part in test.values if truth(part, values) is None]
    word = " and " if isinstance(test.op, ast.And) else " or "
    return word.join(source[slice(*span(source, part))] for part in parts) if len(parts) < len(test.values) else None


def without_zero(source: str, node: ast.BinOp) -> str | None:
    """`0 + x` and `x + 0` as x; what a literal 0 is times, over or modulo a constant of the module, which is 0."""
    if is_zero(node.right) and isinstance(node.op, ast.Add):
        return source[slice(*span(source, node.left))]
    if not is_zero(node.left):
        return None
    if isinstance(node.op, ast.Add):
        return source[slice(*span(source, node.right))]
    constant = isinstance(node.right, ast.Name) and node.right.id.isupper()
    return "0" if constant and isinstance(node.op, (ast.Mult, ast.FloorDiv, ast.Mod)) else None


def is_zero(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value == 0


def single(loop: ast.For, values: Mapping[str, Value]) -> int | None:
    """The one number that `for x in tl.static_range(A, b)` visits, where A is a constant and there is one."""
    call = loop.iter
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "static_range":
        start, end = (values.get(a.id) if isinstance(a, ast.Name) else getattr(a, "value", None) for a in call.args)
        if isinstance(start, int) and isinstance(end, int) and end - start == 1:
            return start
    return None


def written_out(source: str, slot: Slot) -> str:
    """The slot's name in parameter lists and calls replaced by what it stands for."""
    if not re.search(rf"\b{slot.name}\b", source):
        return source
    edits = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            for place, _ in parameters(node):
                if place.arg == slot.name:
                    edits.append(listed(source, place, slot.parameters))
        elif isinstance(node, ast.Call):
            edits += [
                listed(source, argument, slot.arguments)
                for argument in node.args
                if isinstance(argument, ast.Name) and argument.id == slot.name
            ]
    return applied(source, edits)


def parameters(function: ast.FunctionDef) -> list[tuple[ast.arg, ast.expr | None]]:
    """Parameters in order, each with its default."""
    places = function.args.args
    defaults: list[ast.expr | None] = [None] * (len(places) - len(function.args.defaults))
    return list(zip(places, [*defaults, *function.args.defaults], strict=True))


def listed(source: str, place: ast.AST, names: Sequence[str]) -> Edit:
    """The place holds these names instead; with none of them it goes with its comma."""
    start, end = span(source, place)
    if names:
        return Edit(start, with_default(source, end), ", ".join(names))
    return Edit(*without_argument(source, start, end), "")


def pruned(source: str, keep: str) -> str:
    """Without assignments, parameters, functions, constants and imports that nothing reads."""
    tree = ast.parse(source)
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} | {keep}
    if edits := [Edit(*blocks_of(source).lines(node), "") for node in tree.body if names_of(node) and not names_of(node) & names]:
        return applied(source, edits)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    edits = []
    unread: dict[str, list[int]] = {}
    for function in functions:
        read = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        edits += [Edit(*blocks_of(source).lines(node), "") for node in unread_assignments(function, read)]
        if function.name != keep:
            places = enumerate(parameters(function))
            set_again = {t.id for n in function.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
            unread[function.name] = [
                at for at, (p, _) in places if p.arg not in read or (p.arg in set_again and replaced(function, p.arg))
            ]
    # Of places side by side the first: their edits would meet at a comma, in a list that is closed by one elsewhere than in others.
    apart = {name: [at for at in places if at - 1 not in places] for name, places in unread.items()}
    return applied(source, edits or without_parameters(source, tree, functions, apart))


def replaced(function: ast.FunctionDef, name: str) -> bool:
    """Whether the body sets a name before it reads it: then nothing depends on what is passed."""
    for node in function.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return not reads(node.value, name)
        if reads(node, name):
            return False
    return False


def reads(tree: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(tree))


def unread_assignments(function: ast.FunctionDef, read: set[str]) -> Iterator[ast.stmt]:
    """Statements `x = …` and `x += …` whose name nothing reads; their right sides have no effect in a kernel."""
    for node in ast.walk(function):
        one = [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else []
        targets = node.targets if isinstance(node, ast.Assign) else one
        names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        if names and not set(names) & read and isinstance(node, ast.stmt):
            yield node


def without_parameters(
    source: str, tree: ast.Module, functions: Sequence[ast.FunctionDef], unread: Mapping[str, Sequence[int]]
) -> list[Edit]:
    """The functions and every call of them without the parameters at these places; `f[grid](…)` is a call too."""
    edits: list[Edit] = []
    for function in functions:
        places = parameters(function)
        edits += [Edit(*without_argument(source, *span(source, places[at][0])), "") for at in unread.get(function.name, ())]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.value if isinstance(node.func, ast.Subscript) else node.func
            if isinstance(called, ast.Name):
                edits += [Edit(*without_argument(source, *span(source, node.args[at])), "") for at in unread.get(called.id, ())]
    return edits


def names_of(node: ast.stmt) -> set[str]:
    """What a statement of the module defines."""
    if isinstance(node, ast.FunctionDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {t.id for t in node.targets if isinstance(t, ast.Name)}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return set()
