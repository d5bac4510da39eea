"""The format of a source, and the reader of each format, which returns its samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pipeline.config import ConfigError
from pipeline.data.shards.tar_source import holds_tars, is_pattern, read_tars
from pipeline.data.sources.folders import LIST_SUFFIXES, has_sidecars, read_folders, read_sidecars
from pipeline.data.sources.json_files import read_json_file
from pipeline.data.sources.sample import Source, SourceOptions, few
from pipeline.data.sources.tables import read_table
from pipeline.data.sources.walk import hidden

LIST_NAMES = ("metadata", "captions", "results", "annotations", "labels")
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}


def read_source(source: str | Path, options: SourceOptions = SourceOptions()) -> Source:  # noqa: B008 - frozen
    """The samples of ``source`` in a stable order (sorted by name for folders, file order for lists).

    Raises:
        ConfigError: When the source has no known format or is inconsistent.
    """
    path = Path(source)
    if is_pattern(source):
        return read_tars(source, options)
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    if path.is_dir() and options.format in ("auto", "csv", "json", "coco"):
        listing = _list_in(path, options)
        if listing is not None:
            found = read_source(listing, options)
            return replace(found, notes=[f"{path} holds {listing.name}, which is read", *found.notes])
    return READERS[sniff(path) if options.format == "auto" else options.format](path, options)


READERS = {
    "imagefolder": read_folders,
    "sidecar": read_sidecars,
    "csv": read_table,
    "json": read_json_file,
    "coco": read_json_file,
    "webdataset": read_tars,
}


def _list_in(folder: Path, options: SourceOptions) -> Path | None:
    """The table or JSON file in a folder that names its images, as in Flickr8k and HF's imagefolder.

    None if no file names images, and for several class folders unless the file has such a name.

    Raises:
        ConfigError: For several such files, or for none if the given format needs one.
    """
    if options.format == "auto" and ((folder / "index.json").exists() or holds_tars(folder) or has_sidecars(folder)):
        return None
    entries = sorted(entry for entry in folder.iterdir() if not hidden(entry.name))
    lists = [entry for entry in entries if entry.suffix.lower() in LIST_SUFFIXES and entry.is_file()]
    if options.format == "auto" and sum(entry.is_dir() for entry in entries) > 1:
        lists = [entry for entry in lists if entry.stem.lower() in LIST_NAMES]
    named = [entry for entry in lists if _names_images(entry, options)]
    if len(named) > 1:
        names = few([entry.name for entry in named], 5)
        raise ConfigError(f"{folder}: {names} name its images; take one of these files")
    if not named and options.format != "auto":
        raise ConfigError(f"{folder}: a folder, and no file in it is a {options.format} that names its images")
    return named[0] if named else None


def _names_images(file: Path, options: SourceOptions) -> bool:
    try:
        return bool(read_source(file, replace(options, classnames=None)).samples)
    except ConfigError as error:
        # A broken list counts, so that the message describes its fault.
        if file.stem.lower() in LIST_NAMES:
            raise ConfigError(f"{error}") from None
        return False


def sniff(path: Path) -> Literal["imagefolder", "sidecar", "csv", "json", "webdataset"]:
    """Detect the format of a source; ConfigError with the findings if it is unknown."""
    if holds_tars(path) and not (path / "index.json").exists():
        return "webdataset"
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in LIST_SUFFIXES:
            return "json" if suffix in (".json", ".jsonl", ".ndjson") else "csv"
        raise ConfigError(
            f"{path}: not a csv, tsv, txt, json or jsonl file; give a folder of class folders or one of these files"
        )
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
