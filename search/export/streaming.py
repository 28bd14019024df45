"""Ship a video network for one chunk of frames at a time, with its hidden states as inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from rewriter import Plan, Quantized, trace
from rewriter.errors import RewriteError
from rewriter.export import State, first_output_only, run_stream, streaming_int8
from rewriter.graph import facts
from rewriter.int8.onnx import Session, to_onnx
from rewriter.storage import replacing
from search.job import Job
from search.run_dir.files import read_json, write_json

FILE, DESCRIPTION = "model_int8_stream.onnx", "stream.json"
CHUNK = 1
COMPARED = 8  # sequences whose scores, chunk by chunk, must be those of the whole
# Relative to the largest score. An int8 value on a tie may fall to either side of it in another batch size.
TOLERANCE = 0.02


def export_stream(
    job: Job, plan: Plan, quantized: Quantized, folder: Path, chunk: int = CHUNK
) -> tuple[Path, ...]:
    """Write the streaming file of a plan's network, and ``stream.json``, which says how its states are wired.

    Args:
        job: The run; its task is video.
        plan: What the network was made by.
        quantized: The network for whole sequences.
        folder: Of the export.
        chunk: Frames in one step.

    Raises:
        RewriteError: the network mixes frames elsewhere than in recurrent layers that run forwards.
    """
    for name in (FILE, DESCRIPTION):
        (folder / name).unlink(missing_ok=True)
    calibration = torch.cat(list(job.evaluator.calibration))
    if calibration.shape[1] % chunk:
        raise RewriteError(
            f"streaming: chunk: {chunk} does not divide {calibration.shape[1]} frames"
        )
    gm = trace(job.model(), calibration[:2, :chunk])
    first_output_only(gm)
    facts.FIDELITY.put(gm, facts.FIDELITY.get(job.gm))
    stream = streaming_int8(quantized, plan, job.gm, gm)
    assert stream.quantized is not None
    model = to_onnx(stream.quantized)
    session = Session(model, threads=job.evaluator.threads)
    _check(quantized, session, calibration[:COMPARED], stream.states, chunk)
    with replacing(folder / FILE, "wb") as file:
        file.write(model.SerializeToString())
    onnx.checker.check_model(str(folder / FILE))
    write_json(folder / DESCRIPTION, _description(session, stream.states, chunk))
    return folder / FILE, folder / DESCRIPTION


def open_stream(folder: Path, threads: int = 2) -> tuple[Session, tuple[State, ...], int]:
    """The streaming file of an export: its session, its states and the frames of a chunk."""
    about = read_json(folder / DESCRIPTION)
    states = tuple(State(s["input"], torch.tensor(s["initial"])) for s in about["states"])
    return Session(folder / FILE, threads=threads), states, int(about["frames"])


def stream_scores(session: Session, x: Tensor, states: tuple[State, ...], chunk: int) -> Tensor:
    """Scores (N, T) or (N, T, 1) of whole sequences, chunk by chunk with the states carried over."""

    def step(*inputs: Tensor) -> list[Tensor]:
        return [torch.from_numpy(o) for o in session.run(*inputs)]

    return run_stream(step, x, states, chunk)


def _check(
    quantized: Quantized, session: Session, x: Tensor, states: tuple[State, ...], chunk: int
) -> None:
    whole = torch.from_numpy(Session(to_onnx(quantized), threads=1).run(x)[0])
    error = float((stream_scores(session, x, states, chunk) - whole).abs().max())
    largest = float(whole.abs().max()) or 1.0
    if not error <= TOLERANCE * largest:
        raise RewriteError(
            f"streaming: scores in chunks of {chunk}: differ by {error:.3g} of {largest:.3g} from those of "
            "whole sequences; frames are mixed elsewhere than in the recurrent layers"
        )


def _description(session: Session, states: tuple[State, ...], chunk: int) -> dict[str, Any]:
    frames, *inputs = session.inputs
    scores, *outputs = session.outputs
    wired = [
        {
            "input": i,
            "output": o,
            "shape": ["batch", *s.initial.shape],
            "initial": s.initial.tolist(),
        }
        for i, o, s in zip(inputs, outputs, states, strict=True)
    ]
    return {
        "format": 1,
        "file": FILE,
        "frames": chunk,
        "input": frames,
        "output": scores,
        "states": wired,
        "use": "the first chunk of a sequence starts from initial; each output is the input of the next chunk",
    }
