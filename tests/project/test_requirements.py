"""Skipped tests: only for named requirements that a machine lacks, and none that SELORA_REQUIRE names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPPED = "import pytest\n\n@pytest.mark.gpu\ndef test_card():\n    raise AssertionError\n"


def run(repository: Path, folder: Path, required: str) -> subprocess.CompletedProcess[str]:
    """A test that needs a GPU, on a machine without one."""
    (folder / "test_card.py").write_text(SKIPPED)
    (folder / "torch.py").write_text("class cuda:\n    @staticmethod\n    def is_available():\n        return False\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "requirements", "-p", "no:cacheprovider", "-o", "markers=gpu"],
        cwd=folder,
        env=os.environ | {"SELORA_REQUIRE": required, "PYTHONPATH": f"{folder}{os.pathsep}{repository / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_run_ends_with_what_was_skipped_and_why(repository: Path, tmp_path: Path) -> None:
    done = run(repository, tmp_path, "slurm,hosts")
    assert done.returncode == 0, done.stdout
    assert "skipped: 1 of gpu: there is no CUDA device\n1 skipped" in done.stdout


def test_what_is_required_fails_where_it_is_missing(repository: Path, tmp_path: Path) -> None:
    done = run(repository, tmp_path, "gpu")
    assert done.returncode == 1
    assert "gpu: there is no CUDA device, and SELORA_REQUIRE=gpu" in done.stdout
    assert "skipped: nothing" in done.stdout


def test_a_misspelled_requirement_is_refused(repository: Path, tmp_path: Path) -> None:
    done = run(repository, tmp_path, "slrum")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "SELORA_REQUIRE=slrum: not one of " in done.stdout + done.stderr


def test_every_skip_names_what_is_missing(repository: Path) -> None:
    """A test that skips by itself would be skipped even where SELORA_REQUIRE names what it needs."""
    # conftest.py skips what needs a card while cards are hidden.
    own = {repository / "tests" / name for name in ("requirements.py", "conftest.py")} | {Path(__file__)}
    calls = ("pytest.skip(", "mark.skip", "importorskip(")
    found = [
        str(path.relative_to(repository))
        for path in (repository / "tests").rglob("*.py")
        if path not in own and any(call in path.read_text() for call in calls)
    ]
    assert not found


def test_ci_requires_what_it_installs(repository: Path) -> None:
    """A green run of CI is one in which Slurm and the hosts were tested, or which says why not."""
    script = (repository / ".ci" / "run").read_text()
    assert "require=(slurm hosts namespaces tmpfs)" in script
    assert "export SELORA_REQUIRE" in script
    assert script.count(">&2") == 3  # not root, not installed, not allowed
