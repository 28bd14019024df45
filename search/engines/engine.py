"""What an engine is: it turns a quantized network into a file, opens the file and runs it.

One engine is one runtime. It is an object without state, so that the registry can hold it; its
runtime is imported when it is first used, since most are optional.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from rewriter import Quantized
from rewriter.int8 import Finding
from rewriter.int8.onnx import ReadBack, by_annotation


class Session(Protocol):
    """A network that is ready to run."""

    def run(self, x: Tensor) -> list[Tensor]:
        """Flat outputs, each (N, ...), of one batch of inputs (N, ...) in float32."""
        ...


class Engine(Protocol):
    """One way to run an int8 network.

    Attributes:
        name: What ``engine:`` in a config says.
        takes: Targets whose networks it can run; None: all.
        scores: Targets whose candidates it scores unless the config names another engine.
        ships: Targets whose networks are deployed on it: it confirms what was chosen.
        form: What ``export --to`` calls its files; "": it has none.
        target: The target of its file, where the run's own is none that it takes.
        file: Name of its exported file.
        stand_in: Name of the engine that runs its file here where it cannot; "": none can.
        on_device: Whether it runs on the device of the run (torch's) rather than on the CPU.
    """

    name: str

    @property
    def takes(self) -> frozenset[str] | None: ...

    scores: frozenset[str]
    ships: frozenset[str]
    form: str
    target: str
    file: str
    stand_in: str
    on_device: bool

    def version(self) -> str:
        """Version of the runtime, which a score carries; "" where it is not installed."""
        ...

    def missing(self) -> str:
        """Why it cannot run here, with what to do about it; "" where it can."""
        ...

    def emit(self, quantized: Quantized) -> Any:
        """The network as this engine opens it: the bytes of a file, unless ``file`` is "".

        Raises:
            QuantizeError: an operator or a value cannot be written.
        """
        ...

    def open(self, model: Any, threads: int, device: str) -> Session:
        """A session on what ``emit`` made, or on the bytes of such a file."""
        ...

    def lint(self, quantized: Quantized, model: Any) -> Sequence[Finding]:
        """What to know of an emitted model before it is deployed."""
        ...

    def values(
        self, quantized: Quantized, names: Sequence[str], x: Tensor
    ) -> Mapping[str, Tensor]:
        """The int8 values of nodes as this engine computes them, dequantized, in torch's layout."""
        ...


@runtime_checkable
class ReadsBack(Protocol):
    """An engine that can say what its files really compute in int8."""

    def read_back(self, quantized: Quantized, model: Any) -> ReadBack: ...


@runtime_checkable
class OpensAndReads(Protocol):
    """An engine that says so in the pass that opens the file."""

    def open_and_read(
        self, quantized: Quantized, model: Any, threads: int
    ) -> tuple[Session, ReadBack]: ...


def open_and_read(
    engine: Engine, quantized: Quantized, model: Any, threads: int, device: str
) -> tuple[Session, ReadBack]:
    """A session on an emitted model, and what it computes in int8."""
    if isinstance(engine, OpensAndReads):
        return engine.open_and_read(quantized, model, threads)
    return engine.open(model, threads, device), read_back(engine, quantized, model)


def read_back(engine: Engine, quantized: Quantized, model: Any) -> ReadBack:
    """What an emitted model computes in int8: read from the file, or from the annotations where the engine cannot tell."""
    if isinstance(engine, ReadsBack):
        return engine.read_back(quantized, model)
    return by_annotation(quantized)
