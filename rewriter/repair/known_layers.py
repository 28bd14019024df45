"""Repaired layers, found again under a digest of all that they were made from.

The repairs of a layer depend on the graph before it, on its ranges and on the inputs, and on nothing behind it. Plans of one
search differ at a place or two, so that most of them begin alike: up to there the weights, scales and biases of an earlier plan
are taken, which are those that would be made again, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from rewriter.graph import facts
from rewriter.graph.lookup import module_of
from rewriter.int8.annotate import annotation
from rewriter.int8.integer_grid import on_axis, quantize_weight
from rewriter.int8.scheme import channel_axis
from rewriter.int8.simulate import Quantized
from rewriter.storage.cache import Mirror, Store, load, save_to
from rewriter.storage.digest import data_digest, key, tensor_digest

# Raised when the repairs of a layer come out differently, so that stored ones are not reused.
VERSION = 1


@dataclass(frozen=True)
class Repaired:
    """What the repairs made of a layer.

    Args:
        weight: on its grid; None where it was not rounded.
        scale: of the weight, () or (C_out,).
        shift: (C_out,) float64, what was added to the bias.
    """

    weight: Tensor | None
    scale: Tensor
    shift: Tensor


class KnownLayers:
    """The repaired layers of one network that a store holds or will hold.

    They are kept on this machine alone: a look-up for each layer would take longer over a network than the repair.

    Args:
        quantized: the network before it is repaired.
        batches: the inputs of the repairs.
        count: how many of them are used.
        repairs: what is repaired.
        store: where repaired layers are kept; None: nowhere.
    """

    def __init__(
        self,
        quantized: Quantized,
        batches: Iterable[Tensor | tuple[Tensor, ...]],
        count: int,
        repairs: frozenset[str],
        store: Store | None,
    ) -> None:
        self._quantized = quantized
        self._store = store.folder if isinstance(store, Mirror) else store
        self._keys: dict[fx.Node, str] = {}
        if store is not None:
            about = f"{VERSION} {count} {' '.join(sorted(repairs))} {quantized.scheme.identity}"
            start = key(["repaired", data_digest(batches), about])
            for node in quantized.gm.graph.nodes:
                self._keys[node] = self._key(node, start)

    def get(self, node: fx.Node) -> Repaired | None:
        """What is known of a layer of the network before repair."""
        found = None if self._store is None else load(self._store, self._keys[node])
        if found is None:
            return None
        tensors = found[0]
        weight = tensors.get("weight")
        if weight is not None:
            layer: Any = module_of(self._quantized.gm, node)
            spec = annotation(node).weight
            assert spec is not None
            wide = on_axis(tensors["scale"].double(), weight, channel_axis(layer, spec))
            weight = (weight.double() * wide).to(layer.weight.dtype)
        return Repaired(weight, tensors["scale"], tensors["shift"])

    def put(self, node: fx.Node, made: Repaired) -> None:
        """Keep what was made of a layer.

        Raises:
            OSError: it cannot be written.
        """
        if self._store is None:
            return
        tensors = {"scale": made.scale, "shift": made.shift}
        if made.weight is not None:
            spec = annotation(node).weight
            assert spec is not None
            axis = channel_axis(module_of(self._quantized.gm, node), spec)
            tensors["weight"] = quantize_weight(made.weight, made.scale, spec, axis)
        save_to(self._store, self._keys[node], tensors, {})

    def _key(self, node: fx.Node, start: str) -> str:
        """A digest of a node, of what it reads and how, and of all before it."""
        if node.op == "placeholder":
            place = [n.name for n in node.graph.find_nodes(op="placeholder")].index(node.name)
            return key([start, f"input {place}"])
        quantized = self._quantized
        known: Any = {n: _Known(self._keys[n]) for n in node.all_input_nodes}
        arguments: Any = map_arg((node.args, node.kwargs), known.__getitem__)
        note = annotation(node) if facts.INT8.known(node) else None
        read = [n for n in node.all_input_nodes if note is not None and n.name in note.reads]
        parts = [
            start,
            node.op,
            repr(arguments),
            *(f"{self._keys[n]} {quantized.value_params(n)} {annotation(n).output}" for n in read),
        ]
        if node.op == "call_module":
            module: nn.Module = module_of(quantized.gm, node)
            parts += [type(module).__qualname__, repr(module)]
            parts += [f"{n} {tensor_digest(t)}" for n, t in module.state_dict().items()]
            if note is not None and note.weight is not None:
                scale = quantized.calibration.weights[node.name]
                parts += [repr(note.weight), tensor_digest(scale)]
        elif node.op == "get_attr":
            value: Any = quantized.gm
            for part in str(node.target).split("."):
                value = getattr(value, part)
            parts.append(tensor_digest(value) if isinstance(value, Tensor) else repr(value))
        else:
            name = getattr(node.target, "__qualname__", str(node.target))
            parts.append(f"{getattr(node.target, '__module__', '')} {name}")
        return key(parts)


@dataclass(frozen=True)
class _Known:
    """An argument that is a node's value."""

    digest: str
