"""Where the cache of a machine is, on machines without a home."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.data.storage.cache import Cache


def test_the_environment_places_and_bounds_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELORA_CACHE", str(tmp_path / "node"))
    monkeypatch.setenv("SELORA_CACHE_GB", "0.5")
    assert Cache.from_environment() == Cache(tmp_path / "node", 500_000_000)
    monkeypatch.delenv("SELORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache.from_environment().directory == tmp_path / "selora"


HOMELESS = """
import os, pwd
os.environ.pop("HOME", None)
pwd.getpwuid = lambda uid: (_ for _ in ()).throw(KeyError(uid))
from pipeline.data.storage.cache import Cache
print(Cache.from_environment().directory, Cache.from_environment().directory)
"""


@pytest.mark.parametrize("said", [{"SELORA_CACHE": "{0}/own"}, {"XDG_CACHE_HOME": "{0}/xdg"}, {}])
def test_a_process_without_a_home_has_a_cache(tmp_path: Path, repository: Path, said: dict[str, str]) -> None:
    """As under `docker run --user 12345`: the variables come first, then TMPDIR, with one warning."""
    unset = ("SELORA_CACHE", "XDG_CACHE_HOME")
    clean = {key: value for key, value in os.environ.items() if key not in unset} | {"TMPDIR": str(tmp_path)}
    environment = clean | {key: value.format(tmp_path) for key, value in said.items()}
    done = subprocess.run(
        [sys.executable, "-c", HOMELESS], env=environment, cwd=repository, capture_output=True, text=True, check=True
    )
    wanted = {"SELORA_CACHE": "own", "XDG_CACHE_HOME": "xdg/selora"}.get("".join(said), f"selora-cache-{os.getuid()}")
    assert done.stdout.split() == [str(tmp_path / wanted)] * 2
    assert done.stderr.count("give another by SELORA_CACHE") == (0 if said else 1)


def test_a_cache_in_tmpdir_is_not_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"selora-cache-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.delenv("SELORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setenv("HOME", str(blocked / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = Cache.from_environment().directory
    assert found.parent == tmp_path
    assert not found.is_symlink()
    assert found.stat().st_mode & 0o777 == 0o700
