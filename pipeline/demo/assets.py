"""The files that ship with the demo, unpacked once into a working folder."""

from __future__ import annotations

import shutil
import tarfile
from importlib import resources
from pathlib import Path

# Archives in assets/ and their folders; they are compressed because of tar's padding of small files.
ARCHIVES = {
    "pretrain.tar.gz": "pretrain",
    "reference.tar.gz": "reference",
    "clothing_train.tar.gz": "clothing_train",
    "eval.tar.gz": "eval",
}
MODEL, BENCHMARK, FINETUNE, GRID = "clip", "benchmark.yaml", "finetune.yaml", "grid.yaml"


def asset(name: str) -> Path:
    """A file or folder of the package's assets."""
    return Path(str(resources.files("pipeline.demo"))) / "assets" / name


def unpack(folder: Path, *names: str) -> Path:
    """Unpack the named archives (by default all) into `folder` if they are missing, and copy the benchmark file."""
    folder.mkdir(parents=True, exist_ok=True)
    for archive in names or tuple(ARCHIVES):
        target = folder / ARCHIVES[archive]
        if target.exists():
            continue
        partial = folder / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(asset(archive)) as tar:
            tar.extractall(partial, filter="data")
        (partial / target.name).rename(target)
        partial.rmdir()
    shutil.copy(asset(BENCHMARK), folder)
    return folder
