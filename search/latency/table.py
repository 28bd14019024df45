"""A table of kernels and their milliseconds on one machine and runtime, kept as CSV in the user's cache folder.

The same kernel takes the same time in every file, so that each is measured once. The file is a table that people and other
machines can read and write: lines that start with # say where it was measured, then come the columns of `COLUMNS`.
A table that a user measured on a device is read and never written.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime

from rewriter.int8.onnx import Kernel, Profile
from search.run_dir.files import RunError

log = logging.getLogger(__name__)

COLUMNS = ("kernel", "milliseconds", "macs", "bytes")
# Kernels of a new file that are in the table already say how busy the machine is now, where they take this share of its time.
ENOUGH_SHARED = 0.2


@dataclass(frozen=True)
class Entry:
    """One kernel's time, and the work it does."""

    milliseconds: float
    macs: int
    bytes: int


@dataclass
class Table:
    """Times of kernels by signature.

    Attributes:
        path: Where it is kept.
        measures: Whether kernels that it lacks are measured on this machine and added.
        about: What the lines with # say.
    """

    path: Path
    measures: bool = True
    about: Mapping[str, str] = field(default_factory=dict[str, str])
    _entries: dict[str, Entry] = field(default_factory=dict[str, Entry], init=False)
    _size: int = field(default=-1, init=False)

    def entries(self) -> Mapping[str, Entry]:
        """All that is known, also what other processes have added since."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._size:
            self._entries = dict(read_table(self.path)) if size else {}
            self._size = size
        return self._entries

    def missing(self, kernels: Iterable[Kernel]) -> list[Kernel]:
        known = self.entries()
        return [k for k in kernels if k.signature not in known]

    def predict(self, kernels: Iterable[Kernel]) -> float:
        """Milliseconds of a file with these kernels; a kernel that the table lacks is taken after the one most like it.

        Raises:
            RunError: the table is empty.
        """
        known = self.entries()
        if not known:
            raise RunError(f"{self.path}: has no kernel yet")
        return sum(
            known[k.signature].milliseconds if k.signature in known else _like(k, known)
            for k in kernels
        )

    def add(self, profile: Profile) -> None:
        """Keep the times of kernels that the table lacks.

        Times of one file are brought to the conditions of the table: the kernels that it knows already take as
        long as it says, or, where there are few of them, all of them together as long as the file does.
        """
        known = self.entries()
        pairs = list(zip(profile.kernels, profile.milliseconds, strict=True))
        total = sum(profile.milliseconds)
        shared = [(known[k.signature].milliseconds, ms) for k, ms in pairs if k.signature in known]
        now = sum(ms for _, ms in shared)
        if now >= ENOUGH_SHARED * total:
            factor = sum(before for before, _ in shared) / now
        else:
            factor = profile.whole / total
        fresh: dict[str, tuple[Kernel, list[float]]] = {}
        for kernel, ms in pairs:
            if kernel.signature not in known:
                fresh.setdefault(kernel.signature, (kernel, []))[1].append(ms)
        rows = [
            (name, f"{factor * sum(times) / len(times):.6f}", kernel.macs, kernel.bytes)
            for name, (kernel, times) in fresh.items()
        ]
        self._append(rows)

    def _append(self, rows: Iterable[tuple[str, str, int, int]]) -> None:
        """Add lines to the file; where it cannot be written, to what this process knows alone."""
        rows = list(rows)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self.path.exists():
            text.write("".join(f"# {key}: {value}\n" for key, value in self.about.items()))
            writer.writerow(COLUMNS)
        writer.writerows(rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # one write at the end of the file, so that several processes can add to it
            with open(self.path, "ab", buffering=0) as file:
                file.write(text.getvalue().encode())
        except OSError as cause:
            log.warning("times of kernels are not kept: %s", cause)
            for name, ms, macs, size in rows:
                self._entries[name] = Entry(float(ms), macs, size)


def read_table(path: Path) -> Iterator[tuple[str, Entry]]:
    """The entries of a CSV file; of a kernel that is in it twice the first.

    Raises:
        RunError: it cannot be read, lacks a column, or a time is no positive number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise RunError(f"{path}: cannot be read: {cause}") from None
    rows = csv.reader(line for line in lines if line.strip() and not line.startswith("#"))
    head: list[str] = next(rows, [])
    if list(COLUMNS[:2]) != head[:2]:
        raise RunError(f"{path}: columns: {', '.join(head)}, expected {', '.join(COLUMNS)}")
    seen: set[str] = set()
    for row in rows:
        if row[:2] == head[:2]:
            continue  # two processes began the file
        try:
            name, milliseconds, macs, size = row[0], float(row[1]), *map(int, row[2:4])
        except (ValueError, IndexError):
            raise RunError(f"{path}: row: {','.join(row)[:80]!r} is not {COLUMNS}") from None
        if not (math.isfinite(milliseconds) and milliseconds > 0):
            raise RunError(f"{path}: milliseconds of {name[:60]!r}: {milliseconds}, expected > 0")
        if name not in seen:
            seen.add(name)
            yield name, Entry(milliseconds, macs, size)


def about_of(path: Path) -> dict[str, str]:
    """What the lines with # of a table say."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and ":" in line:
            key, _, value = line[1:].partition(":")
            found[key.strip()] = value.strip()
    return found


def _like(kernel: Kernel, known: Mapping[str, Entry]) -> float:
    """The time of the kernel of the same operator that does most nearly as much work, by the ratio of the work."""
    same = [e for name, e in known.items() if name.split(" ", 1)[0] == kernel.operator]

    def ratio(entry: Entry) -> float:
        return max((kernel.macs + 1) / (entry.macs + 1), (kernel.bytes + 1) / (entry.bytes + 1))

    nearest = min(same or known.values(), key=lambda e: abs(math.log(ratio(e))))
    return nearest.milliseconds * ratio(nearest)


def cache_folder() -> Path:
    """Where tables are kept: ``QUANTFIX_CACHE``, else the user's cache folder."""
    given = os.environ.get("QUANTFIX_CACHE")
    if given:
        return Path(given) / "latency"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "quantfix" / "latency"


def tables() -> list[Path]:
    """The tables in the cache folder."""
    folder = cache_folder()
    return sorted(folder.glob("*.csv")) if folder.is_dir() else []


def this_machine() -> Table:
    """The table of this machine and of the ONNX Runtime that is installed."""
    processor = _processor()
    runtime = f"onnxruntime {onnxruntime.__version__}"
    name = re.sub(r"[^a-z0-9.]+", "-", f"{processor} {runtime}".lower()).strip("-")
    about = {"processor": processor, "runtime": runtime, "threads": "1"}
    return Table(cache_folder() / f"{name}.csv", about=about)


def user_table(path: Path) -> Table:
    """A table that a user measured.

    Raises:
        RunError: it cannot be used.
    """
    found = Table(path, measures=False)
    if not dict(read_table(path)):
        raise RunError(f"{path}: has no kernel")
    return found


def _processor() -> str:
    """The processor and what of it decides which int8 kernels run."""
    name, flags = platform.processor() or platform.machine(), ""
    file = Path("/proc/cpuinfo")
    if file.is_file():
        text = file.read_text()
        model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        name = model[1] if model else name
        wanted = ("avx2", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
        has = set(re.findall(r"\w+", text))
        flags = " ".join(w for w in wanted if w in has)
    return f"{name} {flags}".strip()
