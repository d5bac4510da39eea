"""From YAML text to `{dotted key: (raw value, origin)}`, without any knowledge of the options.

The YAML is the 1.2 core schema: `1e-5` is a float, `off`, `yes` and dates are text. A repeated key is an error,
because PyYAML would silently keep the last one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.errors import ConfigError, Raw
from pipeline.config.text_file import decode_text

BASE_KEY = "base"  # `base: other.yaml` in a file: read that one first, relative to the file that names it
COMMAND_LINE = "command line"


_CORE_SCHEMA = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)


# Values in one file, aliases written out.
MAX_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """Safe loader of the core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # none of YAML 1.1's  # noqa: RUF012

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        text = node.value
        try:
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)  # "010" is ten in 1.2, not eight
        except ValueError:  # Python parses at most a few thousand digits
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(text)} digits", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in names:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a string that either YAML version would read as something else."""

    yaml_implicit_resolvers = {first: list(rules) for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


for _tag, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_core_int)


def dump_yaml(value: Any) -> str:
    """YAML that `read_chain` reads back as the same value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000)


def parse_value(text: str) -> Any:
    """One value of the command line, read as YAML; raises `yaml.YAMLError`."""
    return yaml.load(text, Loader=_Loader)


def read_chain(path: str | Path) -> dict[str, Raw]:
    """The file and all files it inherits from by `base:`; the nearest one wins. Lists and scalars are leaves.

    Raises ConfigError for a missing or unreadable file, bad YAML, repeated keys and a circle of bases.
    """
    return _read_chain(Path(path), ())


def read_overrides(overrides: list[str]) -> tuple[dict[str, Raw], list[str]]:
    """`["adapter.rank=4", …]` -> (values, faults); the last value of a repeated key counts, as in a shell."""
    values: dict[str, Raw] = {}
    faults: list[str] = []
    for text in overrides:
        key, equals, right = text.partition("=")
        if not equals or not key.strip():
            faults.append(f"{text}: expected key=value, for example adapter.rank=16")
            continue
        try:
            value = parse_value(right)
        except yaml.YAMLError as error:
            faults.append(f"{text}: the value is not readable ({_yaml_problem(error)})")
            continue
        values.update(_flatten_value(key.strip(), value))
    return values, faults


def _read_chain(path: Path, above: tuple[Path, ...]) -> dict[str, Raw]:
    real = path.resolve()
    if real in above:
        circle = " -> ".join(str(_short(each)) for each in (*above[above.index(real) :], real))
        raise ConfigError(f"{BASE_KEY}: the files inherit from each other in a circle: {circle}")
    values = _read_file(path, named_by=above[-1] if above else None)
    base = values.pop(BASE_KEY, None)
    if base is None:
        return values
    if not isinstance(base.value, str):
        raise ConfigError(f"{BASE_KEY}: should be the name of a file, got {base.value!r} ({base.origin})")
    return _read_chain(path.parent / base.value, (*above, real)) | values


def _read_file(path: Path, named_by: Path | None) -> dict[str, Raw]:
    try:
        data = path.read_bytes()
    except OSError as error:
        source = f" (named as {BASE_KEY} by {_short(named_by)})" if named_by else ""
        raise ConfigError(f"cannot read config file {path}: {error.strerror}{source}") from None
    text = decode_text(data, str(path))
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: expected `key: value` lines at the top")
        if _weight(node, {}) > MAX_VALUES:
            raise ConfigError(
                f"{path}: its aliases (*name) expand to more than {MAX_VALUES} values; write fewer of them"
            )
        values: dict[str, Raw] = {}
        faults: list[str] = []
        _walk(loader, node, "", str(_short(path)), values, faults)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_yaml_problem(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: an alias (*name) contains itself") from None
    finally:
        loader.dispose()
    if faults:
        raise ConfigError("\n".join(faults))
    return values


def _weight(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values in a node once each alias is expanded; a few lines can expand to billions."""
    if id(node) not in known:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_weight(each, known) for each in inner)
    return known[id(node)]


def _walk(
    loader: _Loader, node: yaml.MappingNode, prefix: str, file: str, values: dict[str, Raw], faults: list[str]
) -> None:
    """Collect the leaves of a mapping node in `values`, and repeated or nameless keys in `faults`."""
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or not key_node.value:
            faults.append(f"{file}:{line}: a key should be a name")
            continue
        key = prefix + key_node.value
        if key in seen or (key in values and not isinstance(value_node, yaml.MappingNode)):
            earlier = f"line {seen[key]}" if key in seen else values[key].origin
            faults.append(f"{key}: given twice ({file}:{line}, and before at {earlier})")
            continue
        seen[key] = line
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            _walk(loader, value_node, f"{key}.", file, values, faults)
        else:
            values[key] = Raw(loader.construct_object(value_node, deep=True), f"{file}:{line}")


def _flatten_value(key: str, value: Any) -> dict[str, Raw]:
    if not isinstance(value, dict) or not value:
        return {key: Raw(value, COMMAND_LINE)}
    leaves: dict[str, Raw] = {}
    for name, inner in value.items():
        leaves.update(_flatten_value(f"{key}.{name}", inner))
    return leaves


def _short(path: Path) -> Path:
    """The path relative to the working directory, if it is below it."""
    try:
        return path.resolve().relative_to(Path.cwd().resolve())
    except ValueError:
        return path


def _yaml_problem(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error).splitlines()[0]
    problem = error.problem or error.context or "not YAML"
    return f"line {error.problem_mark.line + 1}: {problem}" if error.problem_mark else problem
