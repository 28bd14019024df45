"""Which hidden channels a plan takes away, and what their readers become without them.

The steps of a plan are fitted in the order of the graph, each on what its reader reads in the
network as it is thinned (and rewritten) before it, towards what the *float* network has behind the
reader, less the skip that is added there: so a later reader makes up for errors made earlier, its
own skip's included. Both networks are run side by side, once, whatever the number of steps.

A fit depends on the steps before it and is stored by them: plans that begin alike share what they
begin with.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewriter.damage import fidelity_of
from rewriter.damage.fisher import weigh
from rewriter.fitting.brain_surgeon import Moments, remove, solve
from rewriter.fitting.readers import (
    influence_of,
    input_rows,
    problem_of,
    rows_of,
    set_weights,
    thinned_problem,
    weights_of,
)
from rewriter.fitting.side_by_side import Batches, Values, run_again, some_inputs
from rewriter.graph import facts
from rewriter.graph.edit import copy_graph
from rewriter.graph.lookup import find, module_of
from rewriter.int8.scheme import QuantScheme
from rewriter.plan import Step, rule_named
from rewriter.rules.thin_channels import ThinChannels, channels_of_units, kept_counts
from rewriter.storage.cache import Store, load, save_to
from rewriter.storage.digest import data_digest, graph_digest, key
from rewriter.surgery.hidden_channels import Gate, Hidden, hidden_of, keep_channels, kept_columns

log = logging.getLogger(__name__)

# Raised whenever a fit comes out differently, so that stored ones are not taken for it.
VERSION = 1
# A squeeze reads one row for each input: it is pulled towards its weights by this share.
SQUEEZE_RIDGE = 1e-2

State = dict[str, Tensor]


def is_thin(step: Step) -> bool:
    """Whether a step takes hidden channels away."""
    return isinstance(rule_named(step.rule), ThinChannels)


def fit_thin(
    teacher: fx.GraphModule,
    base: fx.GraphModule,
    steps: Sequence[Step],
    batches: Batches,
    scheme: QuantScheme,
    store: Store | None = None,
    seed: int = 0,
) -> Iterator[tuple[Step, State, dict[str, Any]]]:
    """Kept channels and refitted weights of each step, and how it came out (error, images, seconds).

    Args:
        teacher: Canonical graph of the original network, on the device to work on.
        base: The same with all steps that replace layers, fitted; it is not touched.
        steps: All with ``thin_channels``, in the order of the graph.
        batches: Unlabelled inputs, on the same device.
        scheme: The target.
        store: Where fits are kept.
        seed: Of the positions that are looked at.

    Raises:
        PlanError: a step does not apply.
    """
    what = [graph_digest(teacher), graph_digest(base), data_digest(batches), scheme.identity]
    what += [fidelity_of(teacher, batches).digest, f"thin {VERSION} {seed}"]
    known: list[tuple[State, dict[str, Any]]] = []
    for count in range(1, len(steps) + 1):
        found = None if store is None else load(store, key([*what, *map(str, steps[:count])]))
        if found is None:
            break
        known.append(found)
    for step, (state, report) in zip(steps, known, strict=False):
        yield step, state, report
    if len(known) == len(steps):
        return
    inputs = some_inputs(teacher, batches)
    run = _Thinned(teacher, base, steps, inputs, scheme, seed)
    for count, step in enumerate(steps):
        if count < len(known):
            run.take(step, known[count][0])
            continue
        state, report = run.fit(step)
        if store is not None:
            save_to(store, key([*what, *map(str, steps[: count + 1])]), state, report)
        yield step, state, report


class _Thinned:
    """A network that is thinned step by step beside its original."""

    def __init__(
        self,
        teacher: fx.GraphModule,
        base: fx.GraphModule,
        steps: Sequence[Step],
        inputs: Batches,
        scheme: QuantScheme,
        seed: int,
    ) -> None:
        self.scheme, self.seed = scheme, seed
        self.student = copy_graph(base)
        self.images = sum(len(part[0]) for part in inputs)
        if not any(facts.INFLUENCE.known(n) for n in teacher.graph.nodes):
            weigh(teacher, inputs)
        self.names = {n.name: n for n in teacher.graph.nodes}
        entries = [find(self.student, s.anchor) for s in steps]
        places = [hidden_of(self.student, entry) for entry in entries]
        wanted = [self._behind(h) for h in places]
        self.teacher = Values(teacher, inputs, [t for t, _ in wanted if t is not None])
        gated = [h.entry for h in places if h.gates]
        self.values = Values(self.student, inputs, gated)
        self.pins = gated

    def _behind(self, hidden: Hidden) -> tuple[fx.Node | None, fx.Node | None]:
        """The node of the float network whose value the reader is to make, and the skip to take off it."""
        reader = hidden.reader
        assert reader is not None
        users = list(reader.users)
        same = self.names.get(reader.name)
        if len(users) == 1 and users[0].target is operator.add and users[0].name in self.names:
            others = [n for n in users[0].all_input_nodes if n is not reader]
            order = {n: i for i, n in enumerate(self.student.graph.nodes)}
            if len(others) == 1 and order[others[0]] < order[reader]:
                total = self.names[users[0].name]
                if facts.SHAPE.of(total) == facts.SHAPE.of(users[0]) == facts.SHAPE.of(reader):
                    return total, others[0]
        if same is not None and facts.SHAPE.of(same) == facts.SHAPE.of(reader):
            return same, None
        return None, None

    def take(self, step: Step, state: State) -> None:
        """Carry out a step that is fitted already."""
        hidden = hidden_of(self.student, find(self.student, step.anchor))
        self._reach(hidden)
        target, _ = self._behind(hidden)
        self._slice(hidden, state["kept"])
        for path, value in state.items():
            owner, _, name = path.rpartition(".")
            if owner:
                module = module_of(self.student, find(self.student, owner))
                moved = value.to(module.weight.device, module.weight.dtype)
                setattr(module, name, nn.Parameter(moved, requires_grad=False))
        self._again(hidden)
        self._done(hidden, target)

    def fit(self, step: Step) -> tuple[State, dict[str, Any]]:
        """Fit a step, and carry it out."""
        start = time.perf_counter()
        rule = rule_named(step.rule)
        assert isinstance(rule, ThinChannels)
        hidden = hidden_of(self.student, find(self.student, step.anchor))
        count = kept_counts(hidden.channels, hidden.unit)[rule.percent]
        self._reach(hidden)
        reader = hidden.reader
        assert reader is not None
        layer = module_of(self.student, reader)
        target, skip = self._behind(hidden)
        if target is not None:
            self.teacher.through(target)
        wanted = [
            self._wanted(values, old, layer, reader, target, skip)
            for values, old in zip(self.values.parts, self.teacher.parts, strict=True)
        ]
        moments = self._moments(layer, reader, wanted)
        weight = influence_of(reader, self.names.get(reader.name), len(layer.weight))
        problem = problem_of(self.student, hidden, moments, self.scheme, weight)
        units = remove(problem, [count // hidden.unit])[count // hidden.unit]
        kept = channels_of_units(units, hidden.unit)
        start_weights = problem.start
        columns = kept_columns(self.student, hidden, kept)
        squeezed = [self._squeezed(gate) for gate in hidden.gates]
        self._slice(hidden, kept)
        state: State = {"kept": kept}
        for gate, (pooled, answers) in zip(hidden.gates, squeezed, strict=True):
            self._refit_squeeze(gate, pooled, answers, kept)
            state |= self._state(gate.squeeze)
        if hidden.gates:
            self._again(hidden)
            moments = self._moments(layer, reader, wanted)
            rows = input_rows(layer, columns)
            problem = thinned_problem(problem, moments, start_weights[rows], units)
            units = torch.arange(problem.channels)
        set_weights(layer, solve(problem, units))
        state |= self._state(reader)
        error = self._error(layer, reader, wanted)
        self._done(hidden, target)
        seconds = time.perf_counter() - start
        log.info("%s: %d of %d channels, error %.4f", step, count, hidden.channels, error)
        return state, {"error": error, "images": self.images, "seconds": seconds}

    def _reach(self, hidden: Hidden) -> None:
        assert hidden.reader is not None
        self.values.before(hidden.reader)

    def _done(self, hidden: Hidden, target: fx.Node | None) -> None:
        if target is not None:
            self.teacher.drop(target)
        if hidden.entry in self.pins:
            self.values.drop(hidden.entry)

    def _wanted(
        self,
        values: Mapping[fx.Node, Any],
        old: Mapping[fx.Node, Any],
        layer: nn.Module,
        reader: fx.Node,
        target: fx.Node | None,
        skip: fx.Node | None,
    ) -> Tensor:
        with torch.no_grad():
            if target is None:
                return layer(values[reader.args[0]])  # type: ignore[index]
            y = old[target]
            return y if skip is None else y - values[skip]

    def _moments(self, layer: nn.Module, reader: fx.Node, wanted: Sequence[Tensor]) -> Moments:
        source: Any = reader.args[0]
        generator = torch.Generator().manual_seed(self.seed)
        found: Moments | None = None
        for values, y in zip(self.values.parts, wanted, strict=True):
            x, t = rows_of(layer, values[source], y, self.images, generator)
            assert t is not None
            if found is None:
                found = Moments.empty(x.shape[1], t.shape[1], x.device)
            found.add(x, t)
        assert found is not None
        return found

    def _error(self, layer: nn.Module, reader: fx.Node, wanted: Sequence[Tensor]) -> float:
        """Squared error of the reader relative to the variance of what is wanted."""
        source: Any = reader.args[0]
        error = variance = 0.0
        with torch.no_grad():
            for values, y in zip(self.values.parts, wanted, strict=True):
                error += float((layer(values[source]) - y).double().square().sum())
                axes = (0, 2, 3) if y.ndim == 4 else tuple(range(y.ndim - 1))
                variance += float((y - y.mean(axes, keepdim=True)).double().square().sum())
        return error / max(variance, 1e-30)

    def _squeezed(self, gate: Gate) -> tuple[list[Tensor], list[Tensor]]:
        """What a squeeze reads and makes before channels go."""
        layer, source = module_of(self.student, gate.squeeze), gate.squeeze.args[0]
        pooled = [run_again(self.student, values, source) for values in self.values.parts]
        with torch.no_grad():
            return pooled, [layer(x) for x in pooled]

    def _refit_squeeze(
        self, gate: Gate, pooled: list[Tensor], answers: list[Tensor], kept: Tensor
    ) -> None:
        """Edit a sliced squeeze: it makes what it made, from the channels that are left."""
        layer = module_of(self.student, gate.squeeze)
        x = torch.cat(pooled).flatten(1).index_select(1, kept.to(pooled[0].device)).double()
        y = torch.cat(answers).flatten(1).double()
        x = F.pad(x, (0, 1), value=1.0)
        left = x.T @ x
        more = torch.full_like(left.diagonal(), SQUEEZE_RIDGE * float(left.diagonal().mean()))
        w = weights_of(layer)
        right = x.T @ y + more[:, None] * w
        set_weights(layer, torch.linalg.solve(left + more.diag(), right))

    def _slice(self, hidden: Hidden, kept: Tensor) -> None:
        """Take channels away from the student and from its values."""
        wide = [(n, o, facts.SHAPE.of(n)[hidden.axis]) for n, o in hidden.joined]
        keep_channels(self.student, hidden, kept)
        for values in self.values.parts:
            for node in hidden.values():
                if isinstance(values.get(node), Tensor):
                    x = values[node]
                    values[node] = x.index_select(hidden.axis, kept.to(x.device))
            for node, offset, width in wide:
                if isinstance(values.get(node), Tensor):
                    x = values[node]
                    rest = torch.arange(offset + hidden.channels, width)
                    left = torch.cat([torch.arange(offset), kept + offset, rest])
                    values[node] = x.index_select(hidden.axis, left.to(x.device))

    def _again(self, hidden: Hidden) -> None:
        """Run what is inside a site once more: its gate is another."""
        if not hidden.gates:
            return
        source: Any = hidden.reader.args[0]  # type: ignore[union-attr]
        for values in self.values.parts:
            values[source] = run_again(self.student, values, source, {hidden.entry})

    def _state(self, node: fx.Node) -> State:
        m = module_of(self.student, node)
        return {f"{node.name}.{k}": v.detach().cpu().clone() for k, v in m.state_dict().items()}
