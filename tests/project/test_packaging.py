"""The installed package: its dependencies and the files that it reads."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def built(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of the checkout and the wheel that is built from it, as `uv build` and pip make them; no network."""
    out = tmp_path_factory.mktemp("built")

    def build(source: Path, target: str) -> None:
        subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out], cwd=source, check=True)

    build(repository, "sdist")
    [sdist] = out.glob("*.tar.gz")
    shutil.unpack_archive(sdist, out / "unpacked")
    [source] = (out / "unpacked").iterdir()
    build(source, "wheel")
    [wheel] = out.glob("*.whl")
    return sdist, wheel


def test_sdist_and_wheel_hold_files_and_no_links(built: tuple[Path, Path], repository: Path) -> None:
    """Archives and Windows checkouts do not carry links, so `pipeline/configs` is a copy of `configs`."""
    sdist, wheel = built
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
        assert not [member.name for member in members if not (member.isfile() or member.isdir())]
        names = {member.name.partition("/")[2] for member in members}
    assert {"LICENSE", "configs/own_data.yaml", "pipeline/py.typed", "tests/conftest.py"} <= names
    assert "pipeline/configs" not in names
    with zipfile.ZipFile(wheel) as archive:
        assert not [entry.filename for entry in archive.infolist() if stat.S_ISLNK(entry.external_attr >> 16)]
        assert "pipeline/py.typed" in archive.namelist()
        shipped = {name for name in archive.namelist() if name.startswith("pipeline/configs/")}
    configs = {path.relative_to(repository) for path in (repository / "configs").rglob("*") if path.is_file()}
    assert shipped == {f"pipeline/{path.as_posix()}" for path in configs}


def test_an_installed_wheel_knows_the_shipped_benchmarks(built: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.unpack_archive(built[1], tmp_path / "installed", "zip")
    program = (
        "import pipeline; from pipeline.evaluation.datasets.benchmark import load_benchmark as load;"
        "print(pipeline.__file__, len(load('quick', '/d').rows), len(load('paper', '/d').rows[5].subset))"
    )
    printed = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={"PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert Path(printed[0]).is_relative_to(tmp_path / "installed")
    assert printed[1:] == ["18", "113"]
