"""What is installed with the package: its dependencies and the files that it reads."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

# Imported where an export is written or read back; `pip install selora[export,onnx]` brings them.
EXTRAS = {"onnxruntime", "peft", "tokenizers", "transformers"}
# A part of a distribution that is declared: pydantic pins its own core.
PARTS = {"pydantic_core": "pydantic"}


def imported_modules(package: Path) -> set[str]:
    """Top-level names of all third-party modules that the package imports anywhere."""
    found: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"pipeline"}


def test_every_imported_package_is_declared(repository: Path) -> None:
    """A transitive dependency may go away with any release of the package that brings it."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[\[<>=~!; ]", text)[0].lower().replace("_", "-") for text in project["dependencies"]}
    owners = importlib.metadata.packages_distributions()
    missing = {
        name
        for name in imported_modules(repository / "pipeline") - EXTRAS
        if not declared & {owner.lower().replace("_", "-") for owner in owners.get(PARTS.get(name, name), [name])}
    }
    assert not missing


def test_the_package_holds_no_symlink(repository: Path) -> None:
    """Archives and Windows checkouts do not carry links."""
    assert not [str(path) for path in (repository / "pipeline").rglob("*") if path.is_symlink()]


def test_a_wheel_carries_the_shipped_configs(repository: Path) -> None:
    """Built from the checkout or from the sdist, `pipeline/configs` is a copy of `configs`."""
    build = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["force-include"] == {"configs": "pipeline/configs"}
    assert (repository / "configs" / "benchmark" / "paper.yaml").is_file()
