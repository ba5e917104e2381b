"""What a run has measured so far, on disk after every row, so that one that was interrupted goes on.

kept.found("code-lm", "mean-pooling", "1 of 8 heads")    kept.add(rows)    kept.say("rho", lambda: …)    each writes shrink.json and .md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import harness

from shrinking.rows import Shrunk, compared_by_hand, table

NAME = "shrink"


@dataclass
class Kept:
    """saves: whether anything goes to disk. said: notes by topic, which a run that goes on does not measure again."""

    saves: bool = True
    rows: list[Shrunk] = field(default_factory=list)
    said: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls) -> Kept:
        """What the last run left."""
        path = harness.RESULTS / f"{NAME}.json"
        if not path.exists():
            return cls()
        record = json.loads(path.read_text(encoding="utf-8"))
        return cls(True, [Shrunk(**row) for row in record["rows"]], record["topics"])

    def found(self, model: str, method: str, strength: str) -> Shrunk | None:
        return next((r for r in self.rows if (r.model, r.method, r.strength) == (model, method, strength)), None)

    def add(self, rows: Iterable[Shrunk]) -> None:
        """Keep each row as it comes."""
        for row in rows:
            self.rows.append(row)
            self.save()

    def say(self, topic: str, measure: Callable[[], list[str]]) -> None:
        """The lines of a topic, measured where an earlier run did not."""
        if topic not in self.said:
            self.said[topic] = measure()
            self.save()

    @property
    def notes(self) -> list[str]:
        return [*(line for lines in self.said.values() for line in lines), *compared_by_hand(self.rows)]

    def text(self) -> str:
        return table(self.rows, self.notes)

    def save(self) -> None:
        if self.saves:
            harness.save(NAME, self.rows, self.notes, {"topics": self.said})
            (harness.RESULTS / f"{NAME}.md").write_text(self.text(), encoding="utf-8")
