from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pipeline

CODE = "import json; from pipeline.tracking.environment import environment_tags; print(json.dumps(environment_tags()))"


def tags_of_a_copy(tmp_path: Path) -> dict[str, str]:
    """environment_tags() of a copy of the package outside any checkout, run in tmp_path/work."""
    import json

    source = Path(pipeline.__file__).parent
    package = tmp_path / "installed" / "pipeline"
    if not package.exists():
        shutil.copytree(source / "tracking", package / "tracking")
        for file in source.glob("*.py"):
            shutil.copy(file, package)
    done = subprocess.run(
        [sys.executable, "-c", CODE, "http://me:secret@host"],
        cwd=tmp_path / "work", env={"PYTHONPATH": str(package.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def git(where: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(where), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_tags_describe_the_environment_without_passwords(tmp_path: Path) -> None:
    """Tags name commit dirt libraries and command without passwords."""
    work = tmp_path / "work"
    work.mkdir()
    assert "git.commit" not in tags_of_a_copy(tmp_path)
    git(work, "init", "-q")
    (work / "config.yaml").write_text("a: 1\n")
    git(work, "add", ".")
    git(work, "commit", "-qm", "x")
    tags = tags_of_a_copy(tmp_path)
    assert tags["git.commit"] == tags["mlflow.source.git.commit"] == git(work, "rev-parse", "HEAD")
    assert tags["git.dirty"] == "false"
    (work / "config.yaml").write_text("a: 2\n")
    assert tags_of_a_copy(tmp_path)["git.dirty"] == "true"
    assert {"host", "python", "platform", "version.torch", "version.mlflow"} <= tags.keys()
    assert "http://me:***@host" in tags["command"]
