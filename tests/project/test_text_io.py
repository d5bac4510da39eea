"""Text files are UTF-8 in every locale: no call leaves the encoding to the machine."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

_OPENERS = {"open", "fdopen", "NamedTemporaryFile", "TemporaryFile", "TextIOWrapper", "FileHandler"}
_BINARY_OWNERS = {"Image", "os", "tarfile", "zipfile", "self"}


def _without_encoding(call: ast.Call) -> bool:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given or None in given:
        return False
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return len(call.args) < (1 if name == "read_text" else 2)
    if name in ("run", "Popen", "check_output", "check_call"):
        return "text" in given or "universal_newlines" in given
    if name not in _OPENERS or (name == "open" and isinstance(owner, ast.Name) and owner.id in _BINARY_OWNERS):
        return False
    modes = [*call.args, *given.values()]
    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
    modes = [text for text in texts if re.fullmatch(r"[rwaxbt+U]{1,3}", text)]
    if modes:
        return not any("b" in mode for mode in modes)
    return name in ("open", "TextIOWrapper", "FileHandler")


def _faults(source: str) -> list[int]:
    return [
        node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and _without_encoding(node)
    ]


def test_every_text_file_is_opened_with_its_encoding(repository: Path) -> None:
    places = [
        f"{path.relative_to(repository)}:{line}"
        for folder in ("pipeline", "launch", "docker")
        for path in sorted((repository / folder).rglob("*.py"))
        for line in _faults(path.read_text(encoding="utf-8"))
    ]
    assert places == [], "give encoding='utf-8'"


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("(a / 'b').write_text(x)", [1]),
        ("(a / 'b').write_text(x, 'utf-8')", []),
        ("p.read_text()\np.read_text('utf-8')", [1]),
        ("p.open()\np.open('a')\np.open('rb')\np.open('w', encoding='utf-8')", [1, 2]),
        ("open(p)\nopen(p, 'wb')\nImage.open(p)\nos.open(p, 1)", [1]),
        ("subprocess.run(c, text=True)\nsubprocess.run(c)", [1]),
        ("os.fdopen(f, 'w')\nos.fdopen(f, 'wb')", [1]),
    ],
)
def test_the_rule_sees_what_it_should(source: str, lines: list[int]) -> None:
    assert _faults(source) == lines
