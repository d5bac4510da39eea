"""All files below a folder, each once: images, and the kinds and numbers of all others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.data.image_files import IMAGE_EXTENSIONS, UNREAD_EXTENSIONS
from pipeline.data.sources.account import SHOWN, LeftOut
from pipeline.data.sources.sample import few

# Files that systems and tools add to folders of photos: previews of a NAS, resource forks of macOS, bins.
SYSTEM_FOLDERS = frozenset(
    ("@eaDir", "__MACOSX", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"))
HIDDEN = "hidden and system files"
LINKS = "links to folders that are read elsewhere"


@dataclass
class Walked:
    """The content of ``root``. Paths are relative to it, with ``/``, as in the file system.

    Attributes:
        root: The folder.
        images: Image files by their names, sorted.
        others: All other files, sorted; a reader may use them.
        left_out: Image files that do not exist: broken links.
        ignored: Kind -> number of files that are always skipped.
        links: Links to folders that are read elsewhere, with their targets.
    """

    root: Path
    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)

    @property
    def seen(self) -> int:
        """Number of files and links."""
        return len(self.images) + len(self.others) + len(self.left_out) + self.ignored.total()

    def notes(self) -> list[str]:
        """Notes for the user, a sentence each."""
        notes = []
        if self.links:
            notes.append(f"each folder is read once, so these links to folders are skipped: {few(self.links, SHOWN)}")
        unread = Counter(ext for name in self.others if (ext := extension(name)) in UNREAD_EXTENSIONS)
        if unread:
            counted = ", ".join(f"{count} .{ext}" for ext, count in sorted(unread.items()))
            notes.append(f"not read: {counted}; unpack archives and convert images to jpg, png or webp to pack them")
        return notes


def walk(root: Path) -> Walked:
    """Visit every file below ``root``; each real folder is visited once, links to folders after all real ones.

    Raises:
        ConfigError: For a folder that cannot be listed.
    """
    walked, later = Walked(root), []
    # A link to a parent folder would add everything else in it, and this folder a second time.
    visited = {_identity(folder) for folder in (root.resolve(), *root.resolve().parents)}
    _visit(walked, "", visited, later)
    while later:
        link = later.pop(0)
        if _identity(root / link) in visited:
            walked.ignored[LINKS] += 1
            walked.links.append(f"{printable(link)} -> {printable(str((root / link).readlink()))}")
            continue
        visited.add(_identity(root / link))
        _visit(walked, f"{link}/", visited, later)
    walked.images.sort(key=_files_first)
    walked.others.sort(key=_files_first)
    return walked


def _files_first(name: str) -> list[tuple[bool, str]]:
    """Sort key that puts the files of a folder before those of its subfolders."""
    parts = name.split("/")
    return [(True, part) for part in parts[:-1]] + [(False, parts[-1])]


def _visit(walked: Walked, below: str, visited: set[tuple[int, int]], later: list[str]) -> None:
    """The files in ``root/below`` and in the real folders under it; links to folders are postponed in ``later``."""
    folders = [below]
    while folders:
        below = folders.pop()
        for entry in _entries(walked.root / below):
            name = below + entry.name
            if hidden(entry.name):
                walked.ignored[HIDDEN] += _count(walked.root / name) if entry.is_dir(follow_symlinks=False) else 1
            elif not entry.is_dir():
                _sort_in(walked, name, entry)
            elif entry.is_symlink():
                later.append(name)
            elif _identity(walked.root / name) not in visited:  # a bind mount can show a folder twice
                visited.add(_identity(walked.root / name))
                folders.append(f"{name}/")


def _sort_in(walked: Walked, name: str, entry: os.DirEntry[str]) -> None:
    image = extension(name) in IMAGE_EXTENSIONS
    if entry.is_file():
        (walked.images if image else walked.others).append(name)
    elif image and entry.is_symlink():
        walked.left_out.append(LeftOut(printable(name), "link to a missing file"))
    else:
        walked.ignored["broken links, pipes and devices"] += 1


def kinds(names: Sequence[str]) -> Counter[str]:
    """Kind -> number of files, by their extensions."""
    return Counter(f".{extension(name)} files" if extension(name) else "files without an extension" for name in names)


def extension(name: str) -> str:
    """Lower case, without its dot; empty for a name without one."""
    return os.path.splitext(name)[1][1:].lower()  # noqa: PTH122 - creating a Path for each file takes as long as the walk


def hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to the system or a tool, not to the data."""
    return name.startswith(".") or name in SYSTEM_FOLDERS or name.lower() in SYSTEM_FILES


def printable(name: str) -> str:
    """The name of a file as text that can always be encoded; bytes that are not UTF-8 as ``\\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _count(folder: Path) -> int:
    """Number of files and links below a skipped folder."""
    below = os.walk(folder)
    return sum(len(files) + sum((Path(at) / name).is_symlink() for name in folders) for at, folders, files in below)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        where = printable(str(folder))
        raise ConfigError(f"{where}: cannot be listed ({error.strerror}); give the right to read it") from error


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
