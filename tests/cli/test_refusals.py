"""An error of the operating system is one line with the path and the way out, in every command, and exit code 2."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.cli import main
from pipeline.faults import WAYS_OUT, number_of, one_line


def told(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `selora config` prints and ends in 2 with when `work` is what it does."""
    from pipeline.cli import runs

    def run(arguments: Namespace) -> int:
        work()
        return 0

    monkeypatch.setattr(runs, "run_config", run)
    assert main(["config", "any.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("selora config: ")
    assert said.count("\n") == 1, "one line"
    return said.removeprefix("selora config: ").strip()


@pytest.mark.parametrize("number", sorted(WAYS_OUT))
def test_every_refusal_has_a_path_and_a_way_out(number, monkeypatch, capsys) -> None:
    def refuse() -> None:
        raise OSError(number, os.strerror(number), "/data/out/x.json")

    assert told(refuse, monkeypatch, capsys) == f"/data/out/x.json: {os.strerror(number)}; {WAYS_OUT[number]}"


def test_an_error_without_a_file_names_the_one_written(make_disk, monkeypatch, capsys) -> None:
    """An error that names no file is reported with the one that was written."""
    disk = make_disk("64k")
    said = told(lambda: (disk / "a.json").write_text("x" * 200_000, encoding="utf-8"), monkeypatch, capsys)
    assert said.startswith(f"{disk}/a.json: No space left on device; free space there")

    def by_handle() -> None:
        with (disk / "b.bin").open("wb", buffering=0) as file:
            file.write(b"x" * 4096)

    assert told(by_handle, monkeypatch, capsys).startswith(f"{disk}/b.bin: No space left on device")


def test_a_quota_is_told_as_a_quota(tmp_path: Path, monkeypatch, capsys) -> None:
    """No quota can be set in a test: the error comes from the write, without a name, as from the kernel."""
    target = tmp_path / "trainable.safetensors"

    def over() -> None:
        with target.open("wb"):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    assert told(over, monkeypatch, capsys).startswith(f"{target}: Disk quota exceeded; free some of your quota")


def test_safetensors_on_a_full_and_on_a_read_only_disk(make_disk, monkeypatch, capsys) -> None:
    disk = make_disk("64k")
    save_file({"a": torch.ones(1000)}, disk / "whole.safetensors")
    said = told(lambda: save_file({"a": torch.ones(90_000)}, disk / "m.safetensors"), monkeypatch, capsys)
    assert said.startswith(f"{disk}/m.safetensors")
    assert "No space left on device; free space there" in said
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    said = told(lambda: save_file({"a": torch.ones(9)}, disk / "n.safetensors"), monkeypatch, capsys)
    assert said.startswith(f"{disk}/n.safetensors")
    assert "Read-only file system; give a place that can be written" in said
    assert load_file(disk / "whole.safetensors")["a"].sum() == 1000, "what was written before is intact"


def test_a_limit_of_file_sizes_is_named(tmp_path: Path, repository: Path) -> None:
    script = (
        "import sys, torch; from safetensors.torch import save_file; from pipeline.cli import main, runs;"
        "runs.run_config = lambda _: save_file({'a': torch.ones(9000)}, sys.argv[1]);"
        "sys.exit(main(['config', 'x']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "m.safetensors"],
        cwd=repository,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )
    assert done.returncode == 2, done.stderr
    assert "m.safetensors" in done.stderr
    assert done.stderr.strip().endswith(
        "File too large; raise `ulimit -f`, or give a file system that takes files of this size"
    )


def test_a_loading_process_sends_its_error_as_text() -> None:
    last = "OSError: [Errno 5] Input/output error: '/data/s.tar'"
    text = f"Caught OSError in DataLoader worker process 0.\nTraceback …\n{last}"
    assert one_line(OSError(text)) == f"/data/s.tar: Input/output error; {WAYS_OUT[errno.EIO]}"
    assert number_of(ValueError("[Errno 5] of something else")) is None
    assert one_line(KeyError("a mistake of ours keeps its traceback")) is None


def test_a_name_that_is_too_long_is_refused_by_pack(image_folder, tmp_path: Path, capsys) -> None:
    assert main(["pack", str(image_folder(classes=2, each=2)), str(tmp_path / ("n" * 300))]) == 2
    said = capsys.readouterr().err
    assert "File name too long" in said
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_shards_from_looking_whole(image_folder, make_disk, capsys) -> None:
    disk = make_disk("64k")
    assert main(["pack", str(image_folder(classes=4, each=30, size=64)), str(disk / "shards")]) == 2
    assert "No space left on device; the shards are incomplete" in capsys.readouterr().err
    assert main(["verify", str(disk / "shards")]) == 2
    assert "index.json" in capsys.readouterr().err


def test_output_to_a_full_disk_or_a_closed_pipe_is_one_line(repository: Path) -> None:
    command = f"{sys.executable} -m pipeline config configs/own_data.yaml"
    done = subprocess.run(f"{command} > /dev/full", shell=True, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


def test_a_name_the_locale_cannot_write_is_refused() -> None:
    """A name that the locale cannot write is refused with the way out."""
    error = UnicodeEncodeError("latin-1", "runs/日本", 5, 7, "ordinal not in range(256)")
    assert (
        one_line(error)
        == "'runs/\\u65e5\\u672c': cannot be written in this locale's latin-1; set PYTHONUTF8=1 or LC_ALL=C.UTF-8"
    )


def test_no_home_directory_is_reported(monkeypatch, capsys) -> None:
    def look() -> None:
        raise RuntimeError("Could not determine home directory.")

    assert told(look, monkeypatch, capsys) == "~: this process has no home directory; set HOME, or write the whole path"
