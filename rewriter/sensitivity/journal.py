"""What is already measured, one JSON line each, so that a killed analysis goes on where it was.

A line is written as soon as its result is there. The first line is the fingerprint of everything
that a result depends on; under another fingerprint the file is started anew. A last line cut short
by the kill is dropped.
"""

from __future__ import annotations

import json
import os
import time
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from rewriter.int8.annotate import annotation
from rewriter.int8.simulate import Quantized
from rewriter.storage.digest import Digest

FORMAT = 1


class Journal:
    """Results by key, kept in memory and, where a path is given, in a file.

    Args:
        path: the file; its folder must exist. None: memory only.
        fingerprint: what the results depend on.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        self._file: FileIO | None = None
        self._synced = 0.0
        if path is not None:
            self._open(path, fingerprint)

    def _open(self, path: Path, fingerprint: str) -> None:
        header = {"format": FORMAT, "fingerprint": fingerprint}
        lines = _whole_lines(path)
        known = bool(lines) and lines[0] == header
        with path.open("w" if not known else "r+", encoding="utf-8") as file:
            if known:
                text = "".join(json.dumps(line) + "\n" for line in lines)
                file.truncate(len(text.encode()))
            else:
                file.write(json.dumps(header) + "\n")
        if known:
            self.found = {line["key"]: line["value"] for line in lines[1:]}
        # unbuffered: what a full disk did not take must not be written once more on closing
        self._file = path.open("ab", buffering=0)

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def __getitem__(self, key: str) -> Any:
        return self.found[key]

    def add(self, key: str, value: Any) -> None:
        """Record a result; it survives a kill at once, and a power failure within a second."""
        if self._file is None:
            self.found[key] = value
            return
        line = json.dumps({"key": key, "value": value})
        # what a resumed run reads must be what this run goes on with
        self.found[key] = json.loads(line)["value"]
        left = memoryview(line.encode() + b"\n")
        while left:
            left = left[self._file.write(left) :]
        if time.monotonic() - self._synced > 1.0:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()


def _whole_lines(path: Path) -> list[Any]:
    """The lines up to the first that is damaged."""
    lines: list[Any] = []
    if not path.exists():
        return lines
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if not line.endswith("\n"):
                break
            found = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(found, dict) or (lines and not {"key", "value"} <= found.keys()):
            break
        lines.append(found)
    return lines


def journal_key(quantized: Quantized, inputs: Tensor, targets: object, *settings: object) -> str:
    """Identity of a network, its int8 form, the data and the settings."""
    gm, scheme = quantized.gm, quantized.scheme
    notes = [
        (n.name, a.weight, a.output, a.reads, a.range_of)
        for n, a in ((n, annotation(n)) for n in gm.graph.nodes)
    ]
    ranges = sorted(quantized.calibration.values.items())
    digest = Digest()
    digest.add(repr((FORMAT, str(gm), scheme.name, notes, ranges, settings)))
    digest.add([t for _, t in sorted(gm.state_dict().items())])
    digest.add([*quantized.calibration.weights.values(), inputs, targets])
    return digest.hex()
