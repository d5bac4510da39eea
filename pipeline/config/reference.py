"""The page docs/options.md: every option with type, range, default, effect and meaning, from the sections themselves.

python -m pipeline.config.reference > docs/options.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.effects import Effect, effects_of
from pipeline.config.tree import Config
from pipeline.config.yaml_file import dump_yaml

_EFFECTS = {
    Effect.RESULT: "result",
    Effect.MEASUREMENT: "measurement",
    Effect.SPEED: "speed",
    Effect.PLACE: "place",
    Effect.RECORD: "record",
    Effect.PROMOTION: "promotion",
}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_OR_NULL = " or null"
_NAMES = {int: "integer", float: "number", str: "text", bool: "true, false"}
_HEAD = """# Options

<!-- Written by `python -m pipeline.config.reference`; edit pipeline/config/sections.py instead. -->

Options are written in a YAML file, `adapter: {rank: 16}`, or after it on the command line, `adapter.rank=16`. A file
with `base: other.yaml` inherits from another one. `selora config CONFIG` prints every option of a run and where
its value came from.

*Effect* says what an option changes:

| effect | what changes |
| --- | --- |
"""


def render() -> str:
    """The page in Markdown, one table per section."""
    effects = effects_of(Config)
    lines = [f"| {_EFFECTS[effect]} | {effect.value} |" for effect in Effect]
    top = {name: field for name, field in Config.model_fields.items() if not _is_section(field)}
    lines += ["", *_table("General", Config, top, "", effects)]
    for name, field in Config.model_fields.items():
        if _is_section(field):
            section = field.annotation
            lines += ["", *_table(name, section, section.model_fields, f"{name}.", effects)]  # type: ignore[union-attr]
    return _HEAD + "\n".join(lines) + "\n"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _table(
    title: str,
    section: Any,
    fields: Mapping[str, FieldInfo],
    prefix: str,
    effects: Mapping[str, Effect],
) -> Iterator[str]:
    """Heading, docstring if the section has one of its own, and a row per option."""
    yield f"## {title}"
    yield ""
    if prefix and "__doc__" in vars(section) and section.__doc__:
        yield f"{' '.join(section.__doc__.split())}"
        yield ""
    yield "| option | type and range | default | effect | meaning |"
    yield "| --- | --- | --- | --- | --- |"
    for name, field in fields.items():
        key = prefix + name
        cells = (f"`{key}`", _type(field), _default(field), _EFFECTS[effects[key]], field.description or "")
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(field: FieldInfo) -> str:
    """ "integer ≥ 1", "`lora`, `dora`", "number > 0, or null"."""
    bounds = [f"{_BOUNDS[name]} {_short(value)}" for name, value in _constraints(field)]
    text, null = _spelled(field.annotation), ""
    if text.endswith(_OR_NULL):
        text, null = text.removesuffix(_OR_NULL), ("," if bounds else "") + _OR_NULL
    return f"{text}{' ' if bounds else ''}{' and '.join(bounds)}{null}"


def _constraints(field: FieldInfo) -> Iterator[tuple[str, Any]]:
    for mark in field.metadata:
        for name in _BOUNDS:
            if getattr(mark, name, None) is not None:
                yield name, getattr(mark, name)


def _spelled(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in _NAMES:
        return _NAMES[annotation]
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in inner)
    if origin is tuple:
        kinds = [_spelled(each) for each in inner if each is not Ellipsis]
        return f"list of {kinds[0]}" if Ellipsis in inner else f"{len(kinds)} values: {', '.join(kinds)}"
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _spelled(inner[0])
    if NoneType in inner:
        return " or ".join(_spelled(each) for each in inner if each is not NoneType) + _OR_NULL
    return " or ".join(_spelled(each) for each in inner)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple):
        return f"`[{', '.join(_short(each) for each in value)}]`"
    return f"`{_short(value)}`"


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 2**20 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return re.sub(r"\n\.\.\.$", "", dump_yaml(value).strip())


if __name__ == "__main__":
    sys.stdout.write(render())
