"""Files against each other on this machine's clock, and what that says about int8 here."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.int8.onnx import Kernel, Profile, Session, profiled

# Files take turns, so that what else the machine does hits all of them alike.
FEWEST, MOST = 10, 60
BUDGET_S = 3.0  # for all files on one number of threads
WARM = 3
PROFILED = 10  # runs behind the shares of time
AS_FAST = 1.03  # less than this is no difference that repeats
LARGE = 0.15  # a share of the time that is worth a sentence

FLOAT, PLAIN, CHOSEN = "float", "plain int8", "chosen"


@dataclass(frozen=True)
class Time:
    """What one file takes for one input.

    Attributes:
        one_ms: Median milliseconds on one thread: processor time, which other processes don't add to.
        all_ms: Median milliseconds by the clock on all threads.
        bytes: Of the file.
    """

    one_ms: float
    all_ms: float
    bytes: int


@dataclass(frozen=True)
class Clocked:
    """The float file, that of plain int8 and the chosen one, measured side by side.

    Attributes:
        times: By name: ``float``, ``plain int8``, ``chosen``.
        threads: What "all" are.
        verdict: What follows, in a few sentences.
        shares: Of the chosen file's time by what it is spent on.
    """

    times: Mapping[str, Time]
    threads: int
    verdict: str
    shares: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}


def clocked(files: Mapping[str, bytes], x: Tensor, threads: int | None = None) -> Clocked:
    """Run files in turns, on one and on all threads.

    Args:
        files: ``float``, ``plain int8`` and ``chosen``.
        x: One input, (1, ...).
        threads: All threads; None: as many as torch uses.
    """
    threads = threads or torch.get_num_threads()
    one = in_turns(files, x, 1)
    every = one if threads == 1 else in_turns(files, x, threads)
    times = {n: Time(round(one[n], 4), round(every[n], 4), len(files[n])) for n in files}
    shares = time_shares(profiled(files[CHOSEN], x, runs=PROFILED))
    return Clocked(times, threads, verdict(times, shares), shares)


def in_turns(files: Mapping[str, bytes], x: Tensor, threads: int) -> dict[str, float]:
    """Median milliseconds of each file; on one thread of processor time, else by the clock."""
    sessions = {name: Session(content, threads=threads) for name, content in files.items()}
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    taken: dict[str, list[int]] = {name: [] for name in files}
    began = time.perf_counter()
    for turn in range(MOST + WARM):
        for name, session in sessions.items():
            start = clock()
            session.run(x)
            taken[name].append(clock() - start)
        if turn >= FEWEST + WARM and time.perf_counter() - began > BUDGET_S:
            break
    return {name: statistics.median(times[WARM:]) / 1e6 for name, times in taken.items()}


def time_shares(profile: Profile) -> dict[str, float]:
    """Shares of a file's time by what it is spent on, largest first."""
    spent: dict[str, float] = {}
    for kernel, ms in zip(profile.kernels, profile.milliseconds, strict=True):
        kind = _kind(kernel)
        spent[kind] = spent.get(kind, 0.0) + ms
    total = sum(spent.values())
    return {k: round(v / total, 4) for k, v in sorted(spent.items(), key=lambda i: -i[1])}


CONVOLUTIONS, DEPTHWISE, GATES = "convolutions", "depthwise layers", "activations and gates"
IN_FLOAT, LAYOUT = "float operators", "changes of layout"


def _kind(kernel: Kernel) -> str:
    if kernel.operator in ("Transpose", "ReorderInput", "ReorderOutput"):
        return LAYOUT
    if kernel.in_float or kernel.operator in ("DequantizeLinear", "QuantizeLinear"):
        return IN_FLOAT
    if kernel.macs:
        word = next((w for w in kernel.signature.split() if w.startswith("group=")), "group=1")
        return CONVOLUTIONS if word == "group=1" else DEPTHWISE
    if kernel.operator.startswith("QLinear") and "Pool" not in kernel.operator:
        return GATES
    return "other operators"


def verdict(times: Mapping[str, Time], shares: Mapping[str, float]) -> str:
    """What the times say, and where int8 does not win, what would."""
    original, plain, chosen = (times[n].one_ms for n in (FLOAT, PLAIN, CHOSEN))
    said = [
        f"The chosen file takes {chosen:.3g} ms on one thread, plain int8 {plain:.3g} "
        f"({_times(chosen / plain)}) and float {original:.3g} ({_times(chosen / original)})."
    ]
    if chosen <= original / AS_FAST:
        return " ".join(said)
    same = chosen <= original * AS_FAST
    said.append(f"On this machine int8 is {'no faster' if same else 'slower'} than float.")
    said += [
        remedy.format(f"{shares[kind]:.0%}")
        for kind, remedy in _REMEDIES.items()
        if shares.get(kind, 0.0) >= LARGE
    ]
    if plain < original / AS_FAST:
        said.append("Plain int8 is faster: search with a smaller search.max_latency_ratio.")
    return " ".join(said)


_REMEDIES = {
    DEPTHWISE: "Depthwise layers take {} of the time; their integer kernels gain little here: a target for another "
    "runtime (tflite, tensorrt) or dense layers (densify_depthwise) would.",
    GATES: "Activations and gates take {} of the time, which a float file computes inside its convolutions: "
    "ReLU in their place (replace_activation_relu) would save most of it.",
    IN_FLOAT: "Float operators and conversions take {} of the time: front.json names them (float_ops), and what "
    "replaces or keeps them outside of the network saves it.",
    LAYOUT: "Changes of layout take {} of the time.",
}


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if math.isfinite(ratio) else "-"
