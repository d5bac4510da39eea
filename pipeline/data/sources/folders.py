"""A folder of class folders, or of images with captions in files next to them -> samples."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipeline.config import ConfigError
from pipeline.config.text_file import decode_text, lines_of
from pipeline.data.image_files import IMAGE_EXTENSIONS
from pipeline.data.shards.members import json_captions
from pipeline.data.sources.account import SHOWN, LeftOut
from pipeline.data.sources.classes import class_names, class_notes
from pipeline.data.sources.sample import Sample, Source, SourceOptions, few, sample_key, unique_keys
from pipeline.data.sources.walk import Walked, hidden, kinds, printable, walk
from pipeline.prompts import natural_key

# Extensions of caption files next to an image, in this order; the rest of the name is that of the image.
CAPTION_FILES = (".txt", ".json")
# Names of tables and JSON files that name images.
LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".token", ".json", ".jsonl", ".ndjson")
LOOSE = "images next to the class folders"
WITH_IMAGE = "caption files, read with their images"


def read_folders(root: Path, options: SourceOptions) -> Source:
    """The images of ``root/CLASS/…``, sorted by name; classes are the folders directly below ``root``.

    Raises:
        ConfigError: For a class folder without an image or with a name that is not UTF-8, and for class names that do
            not match.
    """
    walked = walk(root)
    found = (entry.name for entry in root.iterdir() if entry.is_dir() and not hidden(entry.name))
    folders = sorted(found, key=natural_key)
    images: dict[str, list[str]] = {folder: [] for folder in folders}
    loose = []
    for name in walked.images:
        images.get(name.partition("/")[0], loose).append(name)
    _check_folders(walked, images)
    samples = [
        Sample(sample_key(name), printable(name), root / name, label)
        for label, folder in enumerate(folders)
        for name in images[folder]
    ]
    notes = walked.notes()
    if loose:
        notes.append(f"{len(loose)} {LOOSE} have no class: {few([printable(name) for name in loose], SHOWN)}")
    if captioned := len(_captions_next_to(walked)):
        notes.append(f"{captioned} images have a text file next to them; --format sidecar takes it as their captions")
    names = class_names(folders, options)
    return Source(
        "imagefolder",
        root,
        unique_keys(samples),
        names,
        left_out=walked.left_out,
        ignored=walked.ignored + kinds(walked.others) + Counter({LOOSE: len(loose)} if loose else {}),
        seen=walked.seen,
        folders=folders,
        notes=[*notes, *class_notes(names)],
    )


def _check_folders(walked: Walked, images: dict[str, list[str]]) -> None:
    for folder, found in images.items():
        if printable(folder) != folder:
            raise ConfigError(
                f"{printable(str(walked.root / folder))}: the folder's name is not UTF-8, so it cannot name a "
                "class; rename it (convmv -f latin1 -t utf8 --notest)"
            )
        if found:
            continue
        link = next((link for link in walked.links if link.startswith(f"{folder} -> ")), None)
        why = f" ({link}: read as another class already)" if link else ""
        lists = (name for name in walked.others if name.startswith(f"{folder}/"))
        listing = next((name for name in lists if PurePosixPath(name).suffix.lower() in LIST_SUFFIXES), None)
        if listing is not None:
            raise ConfigError(
                f"{walked.root / folder}: no image, but {printable(listing)}; if that file names the images, it is the "
                f"source: {printable(str(walked.root / listing))}"
            )
        raise ConfigError(
            f"{walked.root / folder}: the class folder holds no image ({', '.join(IMAGE_EXTENSIONS)}){why}; move it out"
        )


def has_sidecars(root: Path) -> bool:
    """Whether most images below ``root`` have a text file with a caption next to them, as written by img2dataset."""
    walked = walk(root)
    # A few of them are opened: numbers are boxes of a detector, and a JSON file without a caption is something else.
    named = _captions_next_to(walked)
    some = sorted(named)[:: max(1, len(named) // 16)]
    read = [image for image in some if any(map(str.isalpha, "".join(_captions(root, named[image])[0])))]
    return 2 * len(named) > len(walked.images) and 2 * len(read) > len(some)


def read_sidecars(root: Path, options: SourceOptions) -> Source:  # noqa: ARG001 - the signature of every reader
    """The images below ``root`` with the captions in the files next to them.

    ``a.txt`` has a caption per line, ``a.json`` has it under the key ``caption``.

    Raises:
        ConfigError: For a folder that cannot be listed.
    """
    walked = walk(root)
    named = _captions_next_to(walked)
    samples: list[Sample] = []
    left_out = list(walked.left_out)
    for name in walked.images:
        captions, fault = _captions(root, named[name]) if name in named else ((), "no caption file next to it")
        if captions:
            samples.append(Sample(sample_key(name), printable(name), root / name, None, captions))
        else:
            left_out.append(LeftOut(printable(name), "no caption", fault))
    used = {file for files in named.values() for file in files}
    others = kinds([name for name in walked.others if name not in used])
    return Source(
        "sidecar",
        root,
        unique_keys(samples),
        left_out=left_out,
        ignored=walked.ignored + others + Counter({WITH_IMAGE: len(used)} if used else {}),
        seen=walked.seen,
        notes=walked.notes(),
    )


def _captions_next_to(walked: Walked) -> dict[str, list[str]]:
    """Image -> the files next to it that may hold its captions, in order of preference."""
    beside: dict[str, list[str]] = defaultdict(list)
    for name in walked.others:
        if (path := PurePosixPath(name)).suffix.lower() in CAPTION_FILES:
            beside[str(path.with_suffix(""))].append(name)
    found = ((name, beside.get(str(PurePosixPath(name).with_suffix("")))) for name in walked.images)
    rank = {suffix: number for number, suffix in enumerate(CAPTION_FILES)}
    return {
        name: sorted(files, key=lambda file: rank[PurePosixPath(file).suffix.lower()]) for name, files in found if files
    }


def _captions(root: Path, files: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The captions in the first of the files that has any, otherwise the reason why there are none."""
    faults = []
    for file in files:
        name = printable(file)
        try:
            text = decode_text((root / file).read_bytes(), name)
            lines = json_captions(text, name) if file.lower().endswith(".json") else lines_of(text)
        except (ConfigError, OSError) as error:
            faults.append(str(error))
            continue
        captions = dict.fromkeys(clean for line in lines if (clean := " ".join(line.split())))
        if captions:
            return tuple(captions), ""
        faults.append(f"{name} holds no caption")
    return (), "; ".join(faults)
