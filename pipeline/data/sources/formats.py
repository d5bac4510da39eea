"""What users have on disk -> a list of samples: the format of a source, and the reader of each format."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.config import ConfigError
from pipeline.data.shards.tar_source import holds_tars, is_pattern, read_tars
from pipeline.data.sources.coco import read_coco
from pipeline.data.sources.folders import has_sidecars, read_folders, read_sidecars
from pipeline.data.sources.sample import Source, SourceOptions
from pipeline.data.sources.tables import read_table
from pipeline.data.sources.walk import hidden

SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}


def read_source(source: str | Path, options: SourceOptions = SourceOptions()) -> Source:  # noqa: B008 - frozen
    """The samples of ``source`` in a stable order (sorted by name for folders, file order for lists).

    Raises:
        ConfigError: When the source is none of the known formats or is inconsistent.
    """
    path = Path(source)
    if is_pattern(source):
        return read_tars(source, options)
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    return READERS[sniff(path) if options.format == "auto" else options.format](path, options)


READERS = {
    "imagefolder": read_folders,
    "sidecar": read_sidecars,
    "csv": read_table,
    "coco": lambda path, _: read_coco(path),
    "webdataset": read_tars,
}


def sniff(path: Path) -> Literal["imagefolder", "sidecar", "csv", "coco", "webdataset"]:
    """The format of a source by its look; ConfigError with what was seen when it is none."""
    if holds_tars(path) and not (path / "index.json").exists():
        return "webdataset"
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in (".csv", ".tsv", ".txt"):
            return "csv"
        if suffix == ".json":
            return "coco"
        raise ConfigError(f"{path}: not a csv, tsv or json file; give a folder of class folders or one of these files")
    if (path / "index.json").exists():
        raise ConfigError(f"{path}: these are packed shards already (index.json); use them as data.train")
    if has_sidecars(path):
        return "sidecar"
    folders = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and not hidden(entry.name)]
    if folders and all(entry.name.lower() in SPLIT_NAMES for entry in folders):
        names = ", ".join(entry.name for entry in folders)
        one = next((entry for entry in folders if entry.name.lower().startswith("train")), folders[0])
        raise ConfigError(f"{path}: its folders look like splits ({names}), not classes; take one: {one}")
    if not folders:
        raise ConfigError(
            f"{path}: no class folders in it; expected {path}/CLASS/IMAGE, or a csv with path and caption"
        )
    return "imagefolder"
