"""What holds for the annotation of any graph."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from torch import fx

from rewriter.graph.lookup import layers, outputs
from rewriter.int8.annotate import Annotation, annotate, annotation, moves_values
from rewriter.int8.scheme import target
from rewriter.tracing.trace import trace
from tests.networks import SIZE, network, seeds


def check_consistent(gm: fx.GraphModule) -> None:
    """What must hold for every annotation, whatever the graph."""
    notes: dict[str, Annotation] = {n.name: annotation(n) for n in gm.graph.nodes}
    order = {n.name: i for i, n in enumerate(gm.graph.nodes)}
    for node in gm.graph.nodes:
        note = notes[node.name]
        assert set(note.reads) <= {n.name for n in node.all_input_nodes}
        for name in note.reads:
            assert notes[name].output is not None, (
                f"{node.name} reads {name}, which has no int8 form"
            )
        readers = [u for u in node.users if node.name in notes[u.name].reads]
        assert (note.output is not None) == bool(readers), (
            f"{node.name}: int8 form without a reader"
        )
        assert (note.output is not None) == bool(note.range_of)
        if note.range_of:
            assert order[note.range_of] <= order[node.name]
            assert notes[note.range_of].range_of == note.range_of
        if moves_values(gm, node) and note.reads and note.range_of:
            assert note.range_of == notes[note.reads[0]].range_of
        if node.meta.get("keep_float"):
            assert note.weight is None


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_random_networks_are_annotated_consistently(seed: int) -> None:
    gm = trace(network(seed), torch.randn(2, *SIZE))
    generator = torch.Generator().manual_seed(seed)
    for name in ("onnxruntime", "tflite"):
        for node in layers(gm):
            node.meta["keep_float"] = bool(torch.rand((), generator=generator) < 0.3)
        annotate(gm, target(name))
        check_consistent(gm)
    for node in layers(gm):
        node.meta["keep_float"] = True
    annotate(gm, target("onnxruntime"))
    assert all(annotation(n).weight is None for n in layers(gm))
    assert outputs(gm)
