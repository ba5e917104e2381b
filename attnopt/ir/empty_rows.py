"""Whether a query may be left without a visible key, as its mask and lengths tell.

causal & window(64), as many queries as keys   ->   each sees at least its own key          padding   ->   not known
"""

from __future__ import annotations

from attnopt.ir.expr import Expr, Term, conjuncts, disjuncts
from attnopt.ir.site import Site


def never_empty(site: Site) -> bool:
    """Whether every query is proved to see a key: each part of the mask admits k == q, and q < number of keys."""
    parts = conjuncts(site.spec.mask)
    return all(map(admits_itself, parts)) and (not parts or site.size("q") == site.size("k"))


def admits_itself(part: Expr) -> bool:
    """Whether a part is, or has an alternative that is, of named terms that admit k == q."""
    named = {"causal", "window", "lookahead", "chunk", "diagonal", "dilated"}
    plain = isinstance(part, Term) and part.name in named and all(a >= 1 for a in part.args)
    return plain or (len(disjuncts(part)) > 1 and any(all(map(admits_itself, conjuncts(e))) for e in disjuncts(part)))
