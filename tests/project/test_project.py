"""The files around the code, for readers and CI."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest


def test_ci_runs_the_test_command_of_the_readme(repository):
    script = repository / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -euo pipefail"
    assert lines[-1] == "exec make test"
    assert "make test" in (repository / "README.md").read_text()


def test_licence_is_the_full_text_and_named_in_the_project(repository):
    text = (repository / "LICENSE").read_text()
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
    assert "9. Accepting Warranty or Additional Liability." in text
    assert tomllib.loads((repository / "pyproject.toml").read_text())["project"]["license"] == "Apache-2.0"


def test_lock_holds_every_direct_dependency(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    locked = {package["name"] for package in tomllib.loads((repository / "uv.lock").read_text())["package"]}
    required = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    names = {re.split(r"[\[<>=~!; ]", text)[0].lower().replace("_", "-") for text in required}
    assert names <= locked


def test_version_is_the_same_everywhere(repository):
    from importlib.metadata import version

    assert version("selora") == tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]


def test_every_package_says_what_it_is_for(repository):
    for path in (repository / "pipeline").rglob("__init__.py"):
        assert path.read_text().startswith('"""'), f"{path.relative_to(repository)} has no docstring"


def test_names_of_tests_are_short(repository):
    """The story belongs in the docstring."""
    long = {
        f"{path.relative_to(repository)}: {node.name}"
        for path in (repository / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) > 60
    }
    assert not long


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    """Only what `make env` reads, and a uv that writes down how it was called instead of installing."""
    for name in ("Makefile", "pyproject.toml", "uv.lock"):
        shutil.copy(repository / name, tmp_path / name)
    tools = tmp_path / "tools"
    tools.mkdir()
    uv = tools / "uv"
    uv.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\nmkdir -p .venv\n'
        'echo "$UV_COMPILE_BYTECODE ${PYTHONDONTWRITEBYTECODE-unset} $*" >> calls\n'
    )
    uv.chmod(0o755)
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{checkout / 'tools'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["make", *arguments],
        cwd=checkout,
        env=os.environ | {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_environment_is_set_up_when_the_lock_changes(checkout):
    """Environment is set up once and again when the lock changes."""
    calls = checkout / "calls"
    assert make(checkout, "env").returncode == 0
    assert make(checkout, "env").returncode == 0
    assert calls.read_text() == "1 unset sync --frozen --python python3\n"
    with (checkout / "uv.lock").open("a") as lock:
        lock.write("# changed\n")
    assert make(checkout, "env").returncode == 0
    assert len(calls.read_text().splitlines()) == 2
    assert len(list((checkout / ".venv").glob(".made-*"))) == 1


def test_old_python_is_told_before_anything_is_installed(checkout):
    old = checkout / "tools" / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = make(checkout, "env", "PYTHON=python3.8")
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed, and python3.8 is Python 3.8.1." in done.stderr
    assert not (checkout / "calls").exists()


# Methods that a library calls: torch, MLflow, Ray, yaml, torchvision.
CALLED_BY_LIBRARIES = {
    *("extra_repr", "forward", "ignore_aliases", "load_context", "on_step_end", "raw_folder"),
    *("on_trial_complete", "set_search_properties", "suggest"),  # of ray.tune.search.Searcher
}


def test_no_function_is_used_by_tests_alone(repository):
    """A function that only a test calls proves nothing about the product."""
    sources = [path for suffix in ("py", "jinja") for path in (repository / "pipeline").rglob(f"*.{suffix}")]
    words = Counter(word for path in sources for word in re.findall(r"\w+", path.read_text(encoding="utf-8")))
    unused = {
        f"{path.relative_to(repository)}: {node.name}"
        for path in sources
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.decorator_list
        if words[node.name] == 1 and not node.name.startswith("__") and node.name not in CALLED_BY_LIBRARIES
    }
    assert not unused
