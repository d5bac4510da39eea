"""Finds the images that a table or a JSON file names."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

from pipeline.data.image_files import IMAGE_EXTENSIONS, UNREAD_EXTENSIONS

# Names of image folders next to a list, or next to its folder.
_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "photos", "pictures", "jpegimages", "data", "train", "val", "test")
_MOST_FOLDERS = 200
_PARENTS = 3


@dataclass(frozen=True)
class Found:
    """The result for one name.

    Attributes:
        file: The image; None if there is none or more than one.
        base: The folder that the name is relative to.
        shortened: Number of leading folders of the name that had to be dropped.
        others: Other files that the name could mean.
    """

    file: Path | None
    base: Path | None = None
    shortened: int = 0
    others: tuple[Path, ...] = ()


class ImagePlaces:
    """The folders in which the images of one list are searched, the likeliest first.

    Args:
        path: The list.
        root: ``--image-root``, which is then the only folder; None: next to the list, in a folder named after the
            split in its name, in its image folders, in the working directory and in the folders above the list.
    """

    def __init__(self, path: Path, root: str | Path | None = None) -> None:
        self._path, self._root = path, root
        self._listings: dict[str, dict[str, str]] = {}

    @cached_property
    def levels(self) -> list[list[Path]]:
        """Folders by level; a name with two files in folders of one level is ambiguous."""
        if self._root is not None:
            return [[Path(self._root)]]
        here = self._path.parent
        above = [here.resolve().parents[i] for i in range(min(_PARENTS, len(here.resolve().parents)))]
        split = self._path.stem.rpartition("_")[2]
        levels = [[here], *([over / split, over / "images" / split] for over in (here, *above[:1]))]
        levels += [self._folders(here), [Path()], self._image_folders(above[:1]), *([folder] for folder in above)]
        seen: set[str] = set()
        kept = [[each for each in level if self._is_new(each, seen)] for level in levels]
        return [level for level in kept if level]

    def looked_in(self) -> str:
        """The folders, for a message."""
        return ", ".join(str(folder) for level in self.levels for folder in level[:8])

    def find(self, name: str) -> Found:
        """The file that ``name`` means: as written, otherwise without its first folders."""
        spellings = [name, name.replace("\\", "/")] if "\\" in name else [name]
        for spelling in spellings:
            if not spelling or "\0" in spelling:
                continue
            if _is_absolute(spelling) and (file := self._in(Path(), spelling)):
                return Found(file, file.parent)
            for shortened, tail in enumerate(_tails(spelling)):
                found = self._at(tail, shortened)
                if found is not None:
                    return found
        return Found(None)

    def _at(self, tail: str, shortened: int) -> Found | None:
        for level in self.levels:
            hits = [(file, base) for base in level if (file := self._in(base, tail))]
            if len(hits) > 1:
                return Found(None, others=tuple(file for file, _ in hits))
            if hits:
                return Found(*hits[0], shortened)
        return None

    def _in(self, base: Path, name: str) -> Path | None:
        folder, _, last = name.rpartition("/")
        directory = os.path.join(base, folder + "/" if folder or name.startswith("/") else "")  # noqa: PTH118
        listing = self._listing(directory)
        for each in _with_extensions(last):
            if actual := listing.get(unicodedata.normalize("NFC", each)):
                return Path(directory) / actual
        return None

    def _listing(self, directory: str) -> dict[str, str]:
        """Name of each file by its name in Unicode's composed form."""
        known = self._listings.get(directory)
        if known is None:
            known = self._listings[directory] = {}
            try:
                with os.scandir(directory or ".") as entries:
                    known |= {unicodedata.normalize("NFC", each.name): each.name for each in entries if each.is_file()}
            except (OSError, ValueError):
                pass  # a folder that cannot be listed has no images; the caller names the missing ones
        return known

    def _folders(self, over: Path) -> list[Path]:
        """The folders in a folder, and in its folder ``images``."""
        folders = _subfolders(over)
        return folders + [
            below for folder in folders if folder.name.lower() == "images" for below in _subfolders(folder)
        ]

    def _image_folders(self, above: Sequence[Path]) -> list[Path]:
        return [folder for over in above for folder in _subfolders(over) if folder.name.lower() in _IMAGE_FOLDERS]

    @staticmethod
    def _is_new(folder: Path, seen: set[str]) -> bool:
        real = os.path.realpath(folder)
        if real in seen or not folder.is_dir():
            return False
        seen.add(real)
        return True


def looks_like_an_image(name: str) -> bool:
    """Whether a text ends like the name of an image file."""
    return name.rpartition(".")[2].strip().lower() in _SUFFIXES and "." in name


_SUFFIXES = set(IMAGE_EXTENSIONS) | UNREAD_EXTENSIONS


def _subfolders(folder: Path) -> list[Path]:
    try:
        found = sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    except OSError:
        return []
    return found if len(found) <= _MOST_FOLDERS else [each for each in found if each.name.lower() in _IMAGE_FOLDERS]


def _is_absolute(name: str) -> bool:
    return name.startswith("/")


def _tails(name: str) -> Iterator[str]:
    """The name, then the name without its first folder, without its first two, and so on."""
    pure = PureWindowsPath(name) if PureWindowsPath(name).drive else PurePosixPath(name)
    parts = [part for part in pure.parts if part != pure.anchor]
    if parts:
        yield "/".join(parts)
    for start in range(1, len(parts)):
        if parts[start] not in ("..", "."):
            yield "/".join(parts[start:])


def _with_extensions(name: str) -> Iterator[str]:
    """The name; without an extension, as in Kaggle's tables of ids, also with those of images."""
    yield name
    if not looks_like_an_image(name):
        yield from (f"{name}.{ext}" for each in IMAGE_EXTENSIONS for ext in (each, each.upper()))
