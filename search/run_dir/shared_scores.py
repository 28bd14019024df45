"""Scores that several run directories share, in a folder or behind an fsspec URL.

An object store has no file that lines are appended to: here each score is a file of its own, named by its plan and its content, with
its per-sample values beside it. What one run puts there the others take over into their own directories.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rewriter.storage import Place, inside, names, read, short, write

log = logging.getLogger(__name__)

LOOK_S = 2.0  # between two looks at what others have put there


@dataclass
class Exchange:
    """The scores of one fingerprint.

    Attributes:
        place: Where they are.
    """

    place: Place
    _seen: set[str] = field(default_factory=set[str], init=False)
    _looked: float = field(default=float("-inf"), init=False)

    @classmethod
    def of(cls, place: Place, fingerprint: str) -> Exchange:
        return cls(inside(inside(place, "scores"), fingerprint))

    def put(self, plan: str, line: bytes, samples: bytes | None) -> None:
        """Show a score to the others: its samples, then its line.

        Raises:
            OSError: it cannot be written.
        """
        name = _name(plan, line)
        if samples is not None:
            write(self.place, f"{name}.npz", samples)
        write(self.place, f"{name}.json", line)
        self._seen.add(name)

    def knows(self, plan: str, line: bytes) -> bool:
        return _name(plan, line) in self._seen

    def news(self) -> Iterator[tuple[bytes, bytes | None]]:
        """Lines and samples that were put there since the last look, by others.

        Raises:
            OSError: they cannot be read.
        """
        if time.monotonic() - self._looked < LOOK_S:
            return
        there = names(self.place)
        for file in there:
            name, _, kind = file.rpartition(".")
            if kind != "json" or name in self._seen:
                continue
            line = read(self.place, file)
            samples = read(self.place, f"{name}.npz") if f"{name}.npz" in there else None
            self._seen.add(name)
            if line is not None:
                yield line, samples
        self._looked = time.monotonic()


def _name(plan: str, line: bytes) -> str:
    return "-".join(short(text) for text in (plan.encode(), line))
