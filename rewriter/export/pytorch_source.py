"""A rewritten network as plain PyTorch source, to be read, edited and loaded by itself."""

from __future__ import annotations

import inspect
import keyword
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, fx, nn

from rewriter.errors import RewriteError
from rewriter.graph import facts
from rewriter.graph.lookup import layer_name

_OPERATORS = {
    operator.add: "{} + {}",
    operator.sub: "{} - {}",
    operator.mul: "{} * {}",
    operator.truediv: "{} / {}",
    operator.floordiv: "{} // {}",
    operator.mod: "{} % {}",
    operator.matmul: "{} @ {}",
    operator.neg: "-{}",
    operator.pow: "{} ** {}",
    operator.getitem: "{}[{}]",
}
_INDENT = "        "


@dataclass(frozen=True)
class Source:
    """A module of source text and the weights that go with it.

    Attributes:
        text: The file: one class, without arguments except for `opaque`.
        class_name: Its name.
        state: State dict of the class.
        opaque: Attributes that the caller must pass in, because their code is the user's own.
    """

    text: str
    class_name: str
    state: Mapping[str, Tensor]
    opaque: tuple[str, ...]


def source_of(gm: fx.GraphModule, class_name: str, note: str = "") -> Source:
    """Write a canonical graph as a class.

    Args:
        gm: The graph.
        class_name: Made a valid name where it is none.
        note: First lines of the file's docstring.

    Raises:
        RewriteError: the graph calls something that has no name to import.
    """
    writer = _Writer(gm)
    body = [line for node in gm.graph.nodes for line in writer.statement(node)]
    inputs = ", ".join(f"{writer.names[n]}: Tensor" for n in gm.graph.find_nodes(op="placeholder"))
    name = _identifier(class_name) or "Network"
    shapes = ", ".join(str((1, *shape)) for shape in facts.EXAMPLE.of(gm))
    arguments = "self, opaque: dict[str, nn.Module]" if writer.opaque else "self"
    lines = [
        '"""'
        + (note or f"{name}, rewritten for int8.")
        + "\n\nInput shapes for a batch of one: "
        + shapes
        + '.\n"""',
        "",
        "from __future__ import annotations",
        "",
        *writer.imports(),
        "",
        "",
        f"class {name}(nn.Module):",
        f"    def __init__({arguments}) -> None:",
        f"{_INDENT}super().__init__()",
        *writer.setup,
        "",
        f"    def forward(self, {inputs}):",
        *body,
        "",
        "",
        f"def load(weights: str{arguments.removeprefix('self')}) -> {name}:",
        '    """The network with its trained weights, in eval mode."""',
        "    from safetensors.torch import load_file",
        "",
        f"    model = {name}({'opaque' if writer.opaque else ''})",
        "    model.load_state_dict(load_file(weights))",
        "    return model.eval()",
        "",
    ]
    return Source("\n".join(lines), name, writer.state, tuple(writer.opaque))


class _Writer:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.setup: list[str] = []
        self.state: dict[str, Tensor] = {}
        self.opaque: list[str] = []
        self.names: dict[fx.Node, str] = {}
        self.modules: dict[str, str] = {}
        self.constants: dict[str, str] = {}
        self.locals = {"self", "torch", "nn", "functional", "operator"}
        self.attributes = {"opaque", *dir(nn.Module)}
        self.functional = False
        self.torch = False
        self.operator = False

    def imports(self) -> list[str]:
        head = ["import operator", ""] if self.operator else []
        head += ["import torch"] if self.torch else []
        head += ["import torch.nn.functional as functional"] if self.functional else []
        return [*head, "from torch import Tensor, nn"]

    def statement(self, node: fx.Node) -> list[str]:
        if node.op == "placeholder":
            self.names[node] = _fresh(node.name, self.locals)
            return []
        if node.op == "output":
            return [f"{_INDENT}return {self._text(node.args[0])}"]
        if node.op == "get_attr":
            self.names[node] = f"self.{self._constant(str(node.target))}"
            return []
        self.names[node] = _fresh(node.name, self.locals)
        made = facts.REWRITTEN_BY.get(node)
        remark = f"  # {made}" if made else ""
        return [f"{_INDENT}{self.names[node]} = {self._call(node)}{remark}"]

    def _call(self, node: fx.Node) -> str:
        args = [self._text(a) for a in node.args] + [
            f"{k}={self._text(v)}" for k, v in node.kwargs.items()
        ]
        if node.op == "call_module":
            return f"self.{self._module(node)}({', '.join(args)})"
        if node.op == "call_method":
            return f"{args[0]}.{node.target}({', '.join(args[1:])})"
        target: Any = node.target
        if target in _OPERATORS and not node.kwargs:
            shown = [
                self._index(node.args[1]) if target is operator.getitem and i else f"{a}"
                for i, a in enumerate(args)
            ]
            return _OPERATORS[target].format(*shown)
        return f"{self._function(node)}({', '.join(args)})"

    def _function(self, node: fx.Node) -> str:
        target: Any = node.target
        name = getattr(target, "__name__", "")
        if target is getattr:
            return "getattr"
        if getattr(torch, name, None) is target:
            self.torch = True
            return f"torch.{name}"
        if getattr(functional, name, None) is target:
            self.functional = True
            return f"functional.{name}"
        if getattr(operator, name, None) is target:
            self.operator = True
            return f"operator.{name}"
        raise RewriteError(f"{node.name}: source cannot name the function: {target}")

    def _module(self, node: fx.Node) -> str:
        path = str(node.target)
        if path in self.modules:
            return self.modules[path]
        module = self.gm.get_submodule(path)
        name = _fresh(_identifier(path), self.attributes)
        self.modules[path] = name
        constructor = construct(module)
        if constructor is None:
            self.opaque.append(name)
            constructor = f'opaque["{name}"]'
        remark = "" if name == path or node.op != "call_module" else f"  # {layer_name(node)}"
        self.setup.append(f"{_INDENT}self.{name} = {constructor}{remark if constructor else ''}")
        self.state |= {
            f"{name}.{k}": v.detach().clone().contiguous() for k, v in module.state_dict().items()
        }
        return name

    def _constant(self, path: str) -> str:
        if path in self.constants:
            return self.constants[path]
        value: Any = operator.attrgetter(path)(self.gm)
        name = _fresh(_identifier(path), self.attributes)
        self.constants[path] = name
        self.torch = True
        shape, kind = tuple(value.shape), value.dtype
        self.setup.append(
            f'{_INDENT}self.register_buffer("{name}", torch.zeros({shape}, dtype={kind}))'
        )
        self.state[name] = value.detach().clone().contiguous()
        return name

    def _text(self, value: Any) -> str:
        """An argument as source."""
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(self._text(p) for p in parts)})"
        if isinstance(value, tuple):
            inner = ", ".join(self._text(v) for v in value)
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, list):
            return f"[{', '.join(self._text(v) for v in value)}]"
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{k!r}: {self._text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, torch.dtype | torch.memory_format):
            self.torch = True
            return str(value)
        if isinstance(value, torch.device):
            self.torch = True
            return f"torch.device({str(value)!r})"
        if (isinstance(value, float) and value != value) or value in (float("inf"), float("-inf")):
            return f"float({str(value)!r})"
        return repr(value)

    def _index(self, index: Any) -> str:
        """An index as people write it: ``x[:, 3:]``."""
        parts = index if isinstance(index, tuple) else (index,)
        shown: list[str] = []
        for part in parts:
            if isinstance(part, slice):
                start, stop = ("" if p is None else self._text(p) for p in (part.start, part.stop))
                shown.append(
                    f"{start}:{stop}" + ("" if part.step is None else f":{self._text(part.step)}")
                )
            else:
                shown.append("..." if part is Ellipsis else self._text(part))
        return ", ".join(shown) + ("," if isinstance(index, tuple) and len(parts) == 1 else "")


def construct(module: nn.Module) -> str | None:
    """The expression that makes an equal module of ``torch.nn``; None for any other class.

    The settings are the module's own attributes, by the names of its constructor's parameters.
    """
    kind = type(module)
    if getattr(nn, kind.__name__, None) is not kind or next(module.children(), None) is not None:
        return None
    arguments: list[str] = []
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in ("device", "dtype", "inplace", "_freeze", "args", "kwargs"):
            continue
        if name == "bias" and not isinstance(getattr(module, "bias", None), bool):
            value: Any = getattr(module, "bias", None) is not None
        elif not hasattr(module, name):
            if parameter.default is inspect.Parameter.empty:
                return None
            continue
        else:
            value = getattr(module, name)
        if isinstance(value, Tensor | nn.Module):
            return None
        value = _short(kind, value)
        if parameter.default is inspect.Parameter.empty or value != parameter.default:
            named = parameter.default is not inspect.Parameter.empty
            arguments.append(f"{name}={value!r}" if named or len(arguments) > 2 else repr(value))
    if kind in (nn.GRU, nn.LSTM, nn.RNN):
        arguments = [
            f"{n}={getattr(module, n)!r}"
            for n in (
                "input_size",
                "hidden_size",
                "num_layers",
                "bias",
                "batch_first",
                "bidirectional",
            )
        ]
    return f"nn.{kind.__name__}({', '.join(arguments)})"


def _short(kind: type[nn.Module], value: Any) -> Any:
    """``3`` for ``(3, 3)`` where the constructor takes either."""
    alike = isinstance(value, tuple) and len(set(value)) == 1 and "Conv" in kind.__name__
    return value[0] if alike else value


def _identifier(text: str) -> str:
    name = re.sub(r"\W", "_", text)
    if name and name[0].isdigit():
        name = f"x{name}"
    return f"{name}_" if keyword.iskeyword(name) else name


def _fresh(name: str, used: set[str]) -> str:
    """`name`, or the next free name like it; edits `used`."""
    name = _identifier(name) or "x"
    unique, number = name, 1
    while unique in used:
        unique, number = f"{name}_{number}", number + 1
    used.add(unique)
    return unique
