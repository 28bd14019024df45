"""What the outputs of a network mean: told by the task or the user, else assumed from the graph, and then said so.

    logits          scores of classes before a softmax, along the channel axis
    probabilities   the same behind a softmax
    sigmoid_logits  scores before a sigmoid, each on its own
    sigmoid         scores in 0..1, each on its own
    values          numbers whose size matters, such as a head that a decoder reads
    coordinates     places, in pixels or any other unit, from any origin
    embeddings      vectors whose direction matters
    ignored         nothing is judged by it

One output may hold several of them side by side along its channel axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rewriter.damage.provenance import Origin, origins
from rewriter.errors import RewriteError
from rewriter.graph import facts
from rewriter.graph.lookup import outputs, unflatten

Kind = Literal[
    "logits",
    "probabilities",
    "sigmoid_logits",
    "sigmoid",
    "values",
    "coordinates",
    "embeddings",
    "ignored",
]
KINDS: tuple[str, ...] = get_args(Kind)
# What a task says of all outputs at once: one class for each input; numbers that a decoder reads; a score for each position; and,
# of the first output alone: classes of pixels, classes of steps (N, T, C), places, vectors, numbers.
Purpose = Literal[
    "classes",
    "decoded",
    "scores",
    "unknown",
    "pixels",
    "steps",
    "places",
    "vectors",
    "numbers",
]
_FIRST: dict[str, Kind] = {
    "pixels": "logits",
    "steps": "logits",
    "places": "coordinates",
    "vectors": "embeddings",
    "numbers": "values",
}
_ENDS: dict[str, Kind] = {
    "softmax": "probabilities",
    "log_softmax": "logits",
    "sigmoid": "sigmoid",
    "normalize": "embeddings",
}


class MeaningError(RewriteError):
    """What was said of the outputs does not fit, or cannot be read."""


@dataclass(frozen=True)
class Part:
    """Channels of one output that mean one thing; no channels: all of them."""

    kind: Kind
    channels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Meaning:
    """What one output means.

    Args:
        parts: of its channels; none of them in two.
        axis: of the channels in (N, ...); None: what the graph says.
        split: whether values of unlike size in one part count apart.
        assumed: whether nobody said so.
    """

    parts: tuple[Part, ...]
    axis: int | None = None
    split: bool = False
    assumed: bool = False

    @staticmethod
    def of(kind: Kind, *, assumed: bool = False) -> Meaning:
        """All channels alike."""
        return Meaning((Part(kind),), split=kind == "values", assumed=assumed)


Declared = tuple[Meaning, ...] | Mapping[str, Meaning]
"""By number, or by name where ``forward`` returns a mapping."""


def declared(spec: Any) -> Declared:
    """Read what a user says of the outputs.

    Args:
        spec: a word for the only output; a list with one entry for each flat output; or a mapping from the names of
            outputs. An entry is a word (``KINDS``), or a mapping of ``kind``, ``axis`` and ``groups``, where a group is
            ``[first, last + 1]`` along the channel axis, or a mapping of ``kind`` and ``channels``, one such pair.

    Raises:
        MeaningError: it has another form.
    """
    if isinstance(spec, str):
        return (_entry(spec, "outputs"),)
    if isinstance(spec, Mapping) and not {"kind", "groups"} & set(map(str, spec)):
        if not spec:
            raise MeaningError("outputs: is empty; name what each output means")
        return {str(name): _entry(item, f"outputs.{name}") for name, item in spec.items()}
    entries = [spec] if isinstance(spec, Mapping) else spec
    if not isinstance(entries, Sequence) or not entries:
        raise MeaningError(f"outputs: must be a list with one entry for each output: {spec!r}")
    found = tuple(_entry(item, f"outputs[{i}]") for i, item in enumerate(entries))
    if all(p.kind == "ignored" for m in found for p in m.parts):
        raise MeaningError("outputs: all are ignored; nothing is left to judge the network by")
    return found


def _entry(item: Any, where: str) -> Meaning:
    if isinstance(item, str):
        return Meaning.of(_kind(item, where))
    if not isinstance(item, Mapping):
        raise MeaningError(f"{where}: must be a word or a mapping of kind and groups: {item!r}")
    _only(item, ("kind", "groups", "axis"), where)
    axis = item.get("axis")
    if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool) or axis < 1):
        raise MeaningError(f"{where}.axis: must be 1 or more (0 counts the inputs): {axis!r}")
    kind = _kind(item["kind"], f"{where}.kind") if "kind" in item else None
    groups = item.get("groups")
    if groups is None:
        if kind is None:
            raise MeaningError(f"{where}: needs kind, groups, or both")
        return Meaning((Part(kind),), axis, split=kind == "values")
    if not isinstance(groups, Sequence) or isinstance(groups, str) or not groups:
        raise MeaningError(f"{where}.groups: must be a list of [first, last + 1]: {groups!r}")
    parts = [_group(g, kind, f"{where}.groups[{i}]") for i, g in enumerate(groups)]
    taken = [c for p in parts for c in p.channels]
    twice = sorted({c for c in taken if taken.count(c) > 1})
    if twice:
        raise MeaningError(f"{where}.groups: channel {twice[0]} is in two groups")
    return Meaning(tuple(parts), axis)


def _group(item: Any, kind: Kind | None, where: str) -> Part:
    channels: Any = item
    if isinstance(item, Mapping):
        _only(item, ("kind", "channels"), where)
        kind = _kind(item["kind"], f"{where}.kind") if "kind" in item else kind
        channels = item.get("channels")
    whole = isinstance(channels, Sequence) and len(channels) == 2
    if not whole or not all(isinstance(c, int) and not isinstance(c, bool) for c in channels):
        raise MeaningError(
            f"{where}: must be [first, last + 1], two channel numbers: {channels!r}"
        )
    first, end = channels
    if not 0 <= first < end:
        raise MeaningError(f"{where}: holds no channel: {[first, end]}")
    if kind is None:
        raise MeaningError(f"{where}: kind is missing")
    return Part(kind, tuple(range(first, end)))


def _kind(word: Any, where: str) -> Kind:
    if word not in KINDS:
        raise MeaningError(f"{where}: unknown: {word!r}; known: {', '.join(KINDS)}")
    return word


def _only(item: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    for key in item:
        if key not in known:
            raise MeaningError(f"{where}: unknown key: {key!r}; known: {', '.join(known)}")


def output_names(gm: fx.GraphModule) -> list[str]:
    """A name for each flat output: its path in what ``forward`` returns, such as ``boxes`` or ``1.scores``."""
    count = len(outputs(gm))
    if not facts.STRUCTURE.known(gm) or facts.STRUCTURE.of(gm) is None:
        return [str(i) for i in range(count)]
    fixed = len(facts.CONSTANT_OUTPUTS.get(gm, {}))
    nested = unflatten(gm, list(range(count))) if count or fixed else ()
    found: dict[int, str] = {}
    constants = set(facts.CONSTANT_OUTPUTS.get(gm, {}))
    for place, (path, value) in enumerate(pytree.tree_flatten_with_path(nested)[0]):
        if place not in constants:
            found[value] = ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)
    return [found.get(i) or str(i) for i in range(count)]


def meanings(
    gm: fx.GraphModule, said: Declared | None = None, purpose: Purpose = "unknown"
) -> tuple[tuple[Meaning, Origin], ...]:
    """What each flat output means, and where it comes from.

    Args:
        gm: canonical graph.
        said: by the user; it comes before all else.
        purpose: what the task says.

    Raises:
        MeaningError: what was said does not fit the outputs.
    """
    ends, sources = outputs(gm), origins(gm)
    found = _by_purpose(ends, sources, purpose)
    if said is not None:
        found = _said(gm, said, found)
    return tuple(
        (_checked(m, node, o, name), o)
        for m, node, o, name in zip(found, ends, sources, output_names(gm), strict=True)
    )


def _said(gm: fx.GraphModule, said: Declared, otherwise: list[Meaning]) -> list[Meaning]:
    names = output_names(gm)
    if isinstance(said, Mapping):
        for name in said:
            if name not in names:
                raise MeaningError(f"outputs.{name}: no such output; there are {', '.join(names)}")
        return [said.get(n, m) for n, m in zip(names, otherwise, strict=True)]
    if len(said) != len(names):
        raise MeaningError(
            f"outputs: {len(said)} listed, but the network returns {len(names)}: {', '.join(names)}"
        )
    return list(said)


def _checked(meaning: Meaning, node: fx.Node, origin: Origin, name: str) -> Meaning:
    """The meaning with its axis, where it fits the output's shape."""
    shape = facts.SHAPE.get(node, ())
    axis = meaning.axis
    if axis is not None and axis >= len(shape):
        raise MeaningError(f"outputs: {name}: axis {axis}: the shape is {_shape(shape)}")
    if axis is None:
        along = any(p.channels or p.kind in _ALONG for p in meaning.parts)
        # one channel only has no axis; classes and vectors must have one
        axis = origin.axis or (1 if along and len(shape) > 1 else 0)
    most = max((c for p in meaning.parts for c in p.channels), default=-1)
    if axis and most >= shape[axis]:
        raise MeaningError(
            f"outputs: {name}: channel {most}: axis {axis} of {_shape(shape)} has {shape[axis]}"
        )
    return Meaning(meaning.parts, axis, meaning.split, meaning.assumed)


_ALONG = ("logits", "probabilities", "embeddings")


def _shape(shape: tuple[int, ...]) -> str:
    return f"(N, {', '.join(map(str, shape[1:]))})"


def _by_purpose(ends: list[fx.Node], sources: list[Origin], purpose: Purpose) -> list[Meaning]:
    told = purpose != "unknown"
    if purpose == "scores":
        return [_scores(o) if i == 0 else Meaning.of("ignored") for i, o in enumerate(sources)]
    rows = [len(facts.SHAPE.get(n, ())) == 2 for n in ends]
    if purpose == "classes":
        first = _classes(sources[0], assumed=False)
        return [first, *(Meaning.of("ignored") for _ in ends[1:])]
    if purpose in _FIRST:
        return [_first(ends[0], sources[0], purpose), *(Meaning.of("ignored") for _ in ends[1:])]
    if purpose == "unknown" and len(ends) == 1:
        shape = facts.SHAPE.get(ends[0], ())
        end = _ending(sources[0])
        alike = end != "sigmoid" and len(set(sources[0].path)) == 1
        if alike and len(shape) == 2 and shape[1] > 1 and _is_float(ends[0]):
            return [_classes(sources[0], assumed=True)]
        if end in ("softmax", "log_softmax", "normalize"):
            return [Meaning.of(_ENDS[end], assumed=True)]
    return [_by_channel(o, row and told, not told) for o, row in zip(sources, rows, strict=True)]


def _is_float(node: fx.Node) -> bool:
    return facts.DTYPE.get(node, torch.float32).is_floating_point


def _classes(origin: Origin, *, assumed: bool) -> Meaning:
    end = _ending(origin)
    kind = _ENDS[end] if end in ("softmax", "log_softmax") else "logits"
    if assumed and end == "normalize":
        kind = "embeddings"
    return Meaning((Part(kind),), axis=1, assumed=assumed)


def _first(node: fx.Node, origin: Origin, purpose: Purpose) -> Meaning:
    shape, end = facts.SHAPE.get(node, ()), _ending(origin)
    kind = _FIRST[purpose]
    if purpose in ("pixels", "steps"):
        axis = 1 if purpose == "pixels" else len(shape) - 1
        if end in ("softmax", "sigmoid"):
            kind = _ENDS[end]
        elif shape[axis] == 1:
            kind = "sigmoid_logits"
        return Meaning((Part(kind),), axis=axis)
    if purpose == "places" and len(shape) == 4:
        kind = "values"  # maps of heat, one for each point
    return Meaning.of(kind)


def _scores(origin: Origin) -> Meaning:
    """One score for each position: no axis of channels, whatever the shape."""
    return Meaning.of("sigmoid" if _ending(origin) == "sigmoid" else "values")


def _ending(origin: Origin) -> str:
    found = set(origin.ends)
    return found.pop() if len(found) == 1 else ""


def _by_channel(origin: Origin, row: bool, assumed: bool) -> Meaning:
    """Channels that went through the same operations mean the same.

    Of one row for each input, as a network with one box or a set of landmarks has it, the numbers are places.
    """
    by_path: dict[int, list[int]] = {}
    for c, path in enumerate(origin.path):
        by_path.setdefault(path, []).append(c)
    parts: list[Part] = []
    for channels in by_path.values():
        scores = all(origin.ends[c] == "sigmoid" for c in channels)
        kind: Kind = "sigmoid" if scores else "coordinates" if row else "values"
        parts.append(Part(kind, tuple(channels) if len(by_path) > 1 else ()))
    return Meaning(tuple(parts), split=True, assumed=assumed)
