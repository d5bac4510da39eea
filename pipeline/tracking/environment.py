"""The environment of a run: code version, libraries, host, command."""

from __future__ import annotations

import getpass
import platform
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.passwords import redact

_LIBRARIES = (
    "selora", "torch", "torchvision", "deepspeed", "ray", "mlflow", "open_clip_torch", "timm", "webdataset",
    "safetensors", "numpy",
)  # fmt: skip
_GIT_SECONDS = 5.0


def environment_tags() -> dict[str, str]:
    """Tags that describe how to reproduce the run; unknown ones are left out."""
    command = redact(shlex.join(sys.orig_argv))
    tags = {
        "mlflow.source.name": command,
        "mlflow.source.type": "LOCAL",
        "command": command,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    with suppress(OSError, KeyError):  # a container may run under a user id without a name
        tags["mlflow.user"] = getpass.getuser()
    return tags | _library_tags() | _git_tags()


def _library_tags() -> dict[str, str]:
    tags = {}
    for name in _LIBRARIES:
        try:
            tags[f"version.{name}"] = version(name)
        except PackageNotFoundError:
            continue
    return tags


def _git_tags() -> dict[str, str]:
    """Commit of the code if it runs from a checkout, otherwise of the working directory."""
    package = Path(__file__).resolve().parents[1]
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None
    where = package if tracked else Path.cwd()
    commit = _git(where, "rev-parse", "HEAD")
    if not commit:
        return {}
    tags = {"mlflow.source.git.commit": commit, "git.commit": commit}
    changes = _git(where, "status", "--porcelain", "--untracked-files=no")
    return tags if changes is None else tags | {"git.dirty": str(bool(changes)).lower()}


def _git(where: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(where), *arguments],
            capture_output=True,
            encoding="utf-8",
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
