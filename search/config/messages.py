"""What is wrong with a config file, in words: the line, the key, and the right key for a misspelt one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

import yaml
from pydantic import BaseModel

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# where a key stands, ("search", "trials"), and an element of a list, ("data", "mean", 0)
Location: TypeAlias = tuple[str | int, ...]


def walk(node: yaml.Node, at: Location, lines: dict[Location, int]) -> Iterator[tuple[int, str]]:
    """Edit `lines`: the line of every key; yields keys that YAML wrongly lets pass."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[*at, i] = item.start_mark.line + 1
            yield from walk(item, (*at, i), lines)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = str(key.value)
            if (*at, name) in lines:
                first = lines[*at, name]
                yield line, f"{dotted((*at, name))}: given twice, first in line {first}"
            lines[*at, name] = line
            yield from walk(value, (*at, name), lines)


def explain(fault: ErrorDetails, schema: type[BaseModel]) -> str:
    """What one fault that pydantic found means to the writer of the file."""
    kind, loc, given = fault["type"], fault["loc"], fault["input"]
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if kind == "extra_forbidden":
        return f"unknown key{_nearest(loc, schema)}"
    if kind == "missing":
        return f"missing{_choices(loc, schema)}"
    if kind == "value_error":
        return message
    if kind in ("model_type", "model_attributes_type"):
        return f"must hold keys{_choices(loc, schema)}; is {given!r}"
    if kind == "string_pattern_mismatch":
        form = "auto, cpu, cuda or cuda:N" if loc[-1] == "device" else '"module:callable"'
        return f"must be {form}; is {given!r}"
    if kind == "literal_error":
        choices = re.findall(r"'(\w+)'", fault.get("ctx", {}).get("expected", ""))
        near = difflib.get_close_matches(str(given), choices, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{message}; is {given!r}{hint}"
    return f"{message}; is {given!r}"


def line_of(loc: Location, lines: Mapping[Location, int]) -> int:
    """The line of the key, or of the mapping that lacks it."""
    while loc not in lines:
        loc = loc[:-1]
    return lines[loc]


def dotted(loc: Location) -> str:
    return ".".join(str(part) for part in loc) or "the file"


def _keys(section: type[BaseModel], at: Location = ()) -> Iterator[tuple[Location, list[str]]]:
    """Every section with the keys it takes."""
    yield at, list(section.model_fields)
    for name, field in section.model_fields.items():
        for option in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from _keys(option, (*at, name))


def _choices(loc: Location, schema: type[BaseModel]) -> str:
    keys = dict(_keys(schema)).get(loc)
    return f" (keys: {', '.join(keys)})" if keys else ""


def _nearest(loc: Location, schema: type[BaseModel]) -> str:
    """The right key: the same word in another section, else the nearest in this one."""
    sections = dict(_keys(schema))
    word, siblings = str(loc[-1]), sections.get(loc[:-1], [])
    elsewhere = [(*at, word) for at, keys in sections.items() if word in keys]
    near = difflib.get_close_matches(word, siblings, 1)
    if elsewhere:
        return f"; did you mean {dotted(elsewhere[0])}?"
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(siblings)}"


def reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "not text in UTF-8"
