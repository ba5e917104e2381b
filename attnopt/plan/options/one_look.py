"""Edits of blocks that need no new look at the graph between them: the last block of the graph is edited first.

    pool layer 0, pool layer 1, drop layer 2 | quantise …      ->      (drop layer 2, pool layer 1, pool layer 0), (quantise), …

To look anew is to write the graph down, to read it again and to recognise every attention of it: seconds for a large model, and once for
each of its layers. An edit of a block reads what stands before the block and lets others read what the block gives. So one that stands
later in the graph reads nothing that an earlier one is about to change, and what it wrote is given to read what the earlier one gives.
Blocks that share weights are edited alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attnopt.plan.options.proposals import Move


def on_one_look(moves: Iterable[Move]) -> Iterator[list[Move]]:
    """The moves in runs, each of which is made before the graph is read again; a run of one is made as it ever was."""
    run: list[Move] = []
    for move in moves:
        fits = by_itself(move)
        if run and (not fits or any(other.group.name == move.group.name for other in run)):
            yield from apart(run)
            run = []
        if fits:
            run.append(move)
        else:
            yield [move]
    yield from apart(run)


def by_itself(move: Move) -> bool:
    """Whether it writes one block anew, and nothing else."""
    alone = move.rewrite.per == "block" and len(move.group.sites) == len(move.group.blocks) == 1
    return alone and set(move.candidate.changes) == {"structure"} and not move.candidate.scales


def apart(moves: list[Move]) -> Iterator[list[Move]]:
    """Those first whose caches go: inputs behind these may get the names of those, before others change form and name."""
    gone = [m for m in moves if m.candidate.cached]
    rest = [m for m in moves if not m.candidate.cached]
    yield from (backwards(some) for some in (gone, rest) if some)


def backwards(moves: list[Move]) -> list[Move]:
    """The last of the graph first."""
    at = {n: i for i, n in enumerate(moves[0].group.host.graph.nodes)}
    return sorted(moves, key=lambda m: max(at.get(n, -1) for n in m.group.sites[0].nodes), reverse=True)
