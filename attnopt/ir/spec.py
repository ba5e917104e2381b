"""AttentionSpec: what one attention computes, and nothing else. The narrow waist of attnopt.

    softmax heads(8, 2) width(64) scale(0.125) causal & window(4096) & padding empty(zero)

A frozen value. `str(spec)` is its one readable line and `parse(line)` an equal value; `reference` gives it meaning,
`cost` its price. A field that is absent means the plain thing: no mask, no scale (1), head counts as the operands have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from attnopt.errors import SpecSyntaxError
from attnopt.ir.clause import EXPRESSIONS, Argument, Clause, Kind, Signature
from attnopt.ir.expr import Const, Expr, operands, render
from attnopt.ir.grammar import Parser, Token
from attnopt.ir.signatures import NORMALIZERS, SIGNATURES

SOFTMAX = Clause("softmax")
MANY = ("score", "weighting", "plus")  # slots that hold several clauses, in the order written
PLAIN = ("normalizer", "heads", "width", "score", "mask", "empty_row")


@dataclass(frozen=True)
class AttentionSpec:
    """The fields in the order in which they act and print.

    heads: counts of query, key and value heads; query head i reads key head i * key_heads // query_heads, or map[i].
    width: of a query or key row, and of a value row.
    shared: which of q, k, v are one tensor (values may be its first channels).
    offset: absolute position of the first query; masks and biases see q + offset.
    pairing: keys and values are all products of two rows. through: keys are an operand, values what it attends to.
    qk_norm, position: what happens to q and k before their product.
    score: what happens to a score, in order; the mask comes after all of it.
    sink: one more logit per row that takes weight and gives nothing.
    empty_row: what a query without visible key gets: the mean of v, zero, or (`free`) either.
    value_scale: a factor on each weight, after normalisation. weighting: mixtures of weights, in order.
    selection: which visible keys a query sees when data decides. correction: what makes up for the others.
    precision, cache: to what q, k, v and the weights are rounded, in the products and between calls.
    gate: a factor on the output row. plus: other attentions that are added to the output.
    """

    normalizer: Clause = SOFTMAX
    heads: Clause | None = None
    width: Clause | None = None
    shared: Clause | None = None
    offset: Clause | None = None
    pairing: Clause | None = None
    through: Clause | None = None
    qk_norm: Clause | None = None
    position: Clause | None = None
    score: tuple[Clause, ...] = ()
    mask: Expr | None = None
    sink: Clause | None = None
    empty_row: str = "mean"
    value_scale: Clause | None = None
    weighting: tuple[Clause, ...] = ()
    selection: Clause | None = None
    correction: Clause | None = None
    precision: Clause | None = None
    cache: Clause | None = None
    gate: Clause | None = None
    plus: tuple[Clause, ...] = ()

    def __post_init__(self) -> None:
        for slot, clause in self.clauses:
            if clause.signature.slot != slot:
                raise ValueError(f"{clause} fills the slot '{clause.signature.slot}', not '{slot}'")
        Clause("empty", (self.empty_row,))

    def __str__(self) -> str:
        parts: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in MANY:
                parts += [str(clause) for clause in value]
            elif field.name == "empty_row":
                parts += [f"empty({value})"] * (value != "mean")
            elif value is not None:
                parts.append(render_mask(value) if field.name == "mask" else str(value))
        return " ".join(parts)

    @property
    def clauses(self) -> tuple[tuple[str, Clause], ...]:
        """Every clause with the name of its slot, in order; the mask and `empty_row` are none."""
        found: list[tuple[str, Clause]] = []
        for field in fields(self):
            value = getattr(self, field.name)
            found += [(field.name, c) for c in (value if isinstance(value, tuple) else (value,)) if isinstance(c, Clause)]
        return tuple(found)

    @property
    def special(self) -> tuple[str, ...]:
        """The filled slots that a plain kernel (normaliser, heads, score terms, mask) does not know: refuse by this."""
        return tuple(dict.fromkeys(slot for slot, _ in self.clauses if slot not in PLAIN))

    @property
    def head_counts(self) -> tuple[int, int, int] | None:
        """Query, key and value heads, or None where the operands decide."""
        return None if self.heads is None else (self.heads.count(0), self.heads.count(1), self.heads.count(2))

    @property
    def scale(self) -> float | None:
        """The product of all constant scales that stand before any other score clause; None if one is not constant."""
        product = 1.0
        for clause in self.score:
            if clause.name != "scale":
                break
            factor = clause.expr(0)
            if not isinstance(factor, Const):
                return None
            product *= factor.value
        return product

    @property
    def biases(self) -> tuple[Expr, ...]:
        return tuple(c.expr(0) for c in self.score if c.name == "add")

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the tensors that the spec reads besides q, k and v, in order of first use."""
        names: dict[str, None] = {}
        clauses = self.clauses
        for field in fields(self):
            if field.name == "mask":
                names |= dict.fromkeys(operands(self.mask))
            for slot, clause in clauses:
                if slot == field.name:
                    names |= dict.fromkeys(operands_of(clause))
        return tuple(names)

    def with_(self, **changes: Any) -> AttentionSpec:
        """A copy with some fields replaced."""
        return replace(self, **changes)


def operands_of(clause: Clause) -> tuple[str, ...]:
    """The operands that a clause reads: those that it names and those in its expressions and specs."""
    names: list[str] = []
    for kind, value in clause.arguments:
        if kind == "operand" and isinstance(value, str):
            names.append(value)
        elif isinstance(value, EXPRESSIONS):
            names += operands(value)
        elif isinstance(value, AttentionSpec):
            names += value.operands
    return tuple(dict.fromkeys(names))


def render_mask(mask: Expr) -> str:
    """The mask as it stands in a line: in parentheses where its first word would read as a clause (sigmoid)."""
    text = render(mask)
    first = re.match(r"\w*", text)
    return f"({text})" if first is not None and first.group() in SIGNATURES else text


class SpecParser(Parser):
    """Reads a whole line: clauses in any order, those of one slot kept in theirs, the mask as a bare expression."""

    known = (*Parser.known, *SIGNATURES)

    def spec(self) -> AttentionSpec:
        found: dict[str, Any] = {}
        start = self.token
        while self.token.kind != "end" and not self.peek(",") and not self.peek(")"):
            token = self.token
            if token.kind != "word" or token.text not in SIGNATURES:
                self.once(found, "mask", token)
                found["mask"] = self.expression()
                continue
            clause = self.clause()
            slot = clause.signature.slot
            if slot in MANY:
                found[slot] = (*found.get(slot, ()), clause)
            else:
                self.once(found, slot, token)
                found[slot] = clause.word(0) if slot == "empty_row" else clause
        if "normalizer" not in found:
            raise self.error(f"a normaliser ({', '.join(NORMALIZERS)})", start)
        return AttentionSpec(**found)

    def once(self, found: dict[str, Any], slot: str, token: Token) -> None:
        if slot in found:
            raise self.error(f"one {slot} only" + "; join masks with '&' or '|'" * (slot == "mask"), token)

    def clause(self) -> Clause:
        token = self.take()
        signature = SIGNATURES[token.text]
        arguments: list[Argument] = []
        chosen: dict[str, Argument] = {}
        # Arguments touch the name: in `softmax (causal | global(4))` the parenthesis opens the mask.
        if self.token.at == token.at + len(token.text) and self.accept("("):
            self.inside(token.text, signature, arguments, chosen)
            self.expect(")")
        least = len(signature.args) - signature.optional
        if len(arguments) < least:
            raise self.error(f"{least} argument(s) for {token.text}", token)
        return Clause(token.text, tuple(arguments), tuple(chosen.items()))

    def inside(self, name: str, signature: Signature, arguments: list[Argument], chosen: dict[str, Argument]) -> None:
        """What stands between the parentheses of a clause: arguments, then options."""
        while True:
            token = self.token
            following = self.tokens[min(self.at + 1, len(self.tokens) - 1)]
            if token.kind == "word" and following.kind == "symbol" and following.text == "=":
                if token.text not in signature.options:
                    raise self.error(f"an option of {name} ({', '.join(signature.options) or 'it has none'})", token)
                if token.text in chosen:
                    raise self.error(f"{token.text} once only", token)
                self.at += 2
                chosen[token.text] = self.argument(signature.options[token.text][0])
            elif len(arguments) < len(signature.args) and not chosen:
                arguments.append(self.argument(signature.args[len(arguments)]))
            else:
                raise self.error(f"at most {len(signature.args)} argument(s) for {name}, then its options", token)
            if not self.accept(","):
                return

    def argument(self, kind: Kind) -> Argument:
        token = self.token
        if kind == "expr":
            return self.expression()
        if kind == "spec":
            return self.spec()
        if kind in ("number", "count"):
            value = self.number()
            whole = not isinstance(value, bool) and isinstance(value, int) and value >= 0
            if isinstance(value, bool) or (kind == "count" and not whole):
                raise self.error(f"a {kind}", token)
            return value
        wanted = "the name of an operand" if kind == "operand" else f"one of {', '.join(kind)}"
        word = self.word(wanted)
        if isinstance(kind, tuple) and word not in kind:
            raise self.error(wanted, token)
        return word


def parse(line: str) -> AttentionSpec:
    """The spec that a line spells; `parse(str(spec)) == spec`. Raises SpecSyntaxError."""
    parser = SpecParser(line)
    spec = parser.spec()
    parser.end()
    return spec


def as_spec(spec: AttentionSpec | str) -> AttentionSpec:
    return parse(spec) if isinstance(spec, str) else spec


__all__ = ["AttentionSpec", "Clause", "SpecSyntaxError", "as_spec", "parse"]
