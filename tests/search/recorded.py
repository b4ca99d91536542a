"""A text scorer that remembers what it was asked and what it said."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Recorded:
    """Passes everything on to `inner`; `seen` holds (candidate, score) in order."""

    inner: Any
    seen: list = field(default_factory=list)

    @property
    def weight(self):
        return self.inner.weight

    def start(self, *sizes):
        return self.inner.start(*sizes)

    def insert(self, memory, slot, conversation):
        return self.inner.insert(memory, slot, conversation)

    def score(self, memory, candidates):
        memory, scores = self.inner.score(memory, candidates)
        self.seen.extend(zip(candidates, scores.tolist(), strict=True))
        return memory, scores

    def keep(self, memory, parents, rows):
        return self.inner.keep(memory, parents, rows)
