"""The structure of the code: size of folders, files and functions, and the direction of imports."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

MODULES, LINES, FUNCTION = 14, 400, 60


def sources(repository: Path) -> Iterator[tuple[Path, str]]:
    for folder in ("pipeline", "tests"):
        for path in sorted((repository / folder).rglob("*.py")):
            yield path.relative_to(repository), path.read_text(encoding="utf-8")


def test_no_folder_has_too_many_modules(repository: Path) -> None:
    modules = [
        path.parent for path, _ in sources(repository) if path.stem != "__init__" and path.parts[0] == "pipeline"
    ]
    assert not {str(folder): count for folder, count in Counter(modules).items() if count > MODULES}


def test_no_file_and_no_function_is_too_long(repository: Path) -> None:
    long = []
    for path, text in sources(repository):
        if (lines := len(text.splitlines())) > LINES:
            long.append(f"{path}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                long += [f"{path}: {node.name} has {lines} lines"] if lines > FUNCTION else []
    assert not long


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count: they hide a circle and do not remove it."""
    graph = grimp.build_graph("pipeline", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 150
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_class_name_has_one_meaning(repository: Path) -> None:
    """A public class name is defined once; a section of the config is named after its key."""
    homes: dict[str, list[str]] = {}
    for path, text in sources(repository):
        if path.parts[0] != "pipeline" or path == Path("pipeline/config/sections.py"):
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(path))
    assert not {name: found for name, found in homes.items() if len(found) > 1}
