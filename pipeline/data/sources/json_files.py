"""A JSON file that names images (COCO captions, a list of records, Karpathy's splits, metadata.jsonl) -> samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.config.text_file import lines_of, parse_json, read_text
from pipeline.data.sources.listed import Rows, read_rows
from pipeline.data.sources.places import looks_like_an_image
from pipeline.data.sources.sample import Source, SourceOptions, few

_PAIR = ("image", "caption")
# Karpathy's splits for training.
_TRAINED_ON = ("train", "restval")


def read_json_file(path: Path, options: SourceOptions) -> Source:
    """The images of a JSON or JSONL file, each with all its captions.

    Raises:
        ConfigError: For JSON that does not name images in a known way.
    """
    text = read_text(path, options.encoding, option=True)
    content = _by_line(path, text) if path.suffix.lower() in (".jsonl", ".ndjson") else _whole(path, text)
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return read_rows(path, "coco", _coco_rows(path, content), options)
    if isinstance(content, dict) and _is_karpathy(content):
        return read_rows(path, "karpathy", _karpathy_rows(content["images"]), options)
    return read_rows(path, "json", _record_rows(path, content), options)


def _whole(path: Path, text: str) -> Any:
    """The value of a JSON file; a list if it has one value per line."""
    lines = [line for line in lines_of(text) if line.strip()]
    if len(lines) > 1 and all(line.lstrip().startswith("{") and line.rstrip().endswith("}") for line in lines):
        return _by_line(path, text)
    return parse_json(text, str(path))


def _by_line(path: Path, text: str) -> list[Any]:
    return [parse_json(line, f"{path}:{number}") for number, line in enumerate(lines_of(text), 1) if line.strip()]


def _coco_rows(path: Path, content: Mapping[str, Any]) -> Rows:
    """A row for each image with its captions; annotations without caption or image are counted."""
    images, annotations = content["images"], content["annotations"]
    for key, value in (("images", images), ("annotations", annotations)):
        if not isinstance(value, list):
            raise ConfigError(f"{path}: {key!r} should be a list, got {type(value).__name__}")
    if annotations and not any(isinstance(each, dict) and "caption" in each for each in annotations):
        raise ConfigError(f"{path}: an annotation has no 'caption'; give a captions_*.json, not instances_*.json")
    captions: dict[str, list[str]] = {}
    empty = 0
    for annotation in annotations:
        whole = isinstance(annotation, dict) and isinstance(annotation.get("caption"), str)
        at = _id(annotation.get("image_id")) if whole else None
        if at is None:
            empty += 1
        else:
            captions.setdefault(at, []).append(annotation["caption"])
    rows: list[tuple[str, Sequence[Any]]] = []
    for number, image in enumerate(images):
        fields = image if isinstance(image, dict) else {}
        at = _id(fields.get("id"))
        place = f"images[{number}]" + ("" if at is None else f" (id {at})")
        rows.append((place, (fields.get("file_name"), captions.pop(at, []) if at is not None else [])))
    notes = [f"{empty} annotations have no caption or no image_id"] if empty else []
    if captions:
        lost = sum(map(len, captions.values()))
        notes.append(f"{lost} captions are of images that 'images' does not list (image_id {few(list(captions), 3)})")
    return Rows(_PAIR, rows, notes=notes)


def _id(value: Any) -> str | None:
    """An id as text: some tools write 7 in one list and "7" in the other."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def _is_karpathy(content: Mapping[str, Any]) -> bool:
    images = content.get("images")
    return isinstance(images, list) and any(isinstance(image, dict) and "sentences" in image for image in images)


def _karpathy_rows(images: Sequence[Any]) -> Rows:
    """The images of the training splits; all images if there are none."""
    fields = [image if isinstance(image, dict) else {} for image in images]
    splits = Counter(str(each.get("split", "train")) for each in fields)
    taken = [split for split in splits if split in _TRAINED_ON] or list(splits)
    rows: list[tuple[str, Sequence[Any]]] = []
    for number, each in enumerate(fields):
        if str(each.get("split", "train")) in taken:
            name, folder = each.get("filename"), each.get("filepath")
            whole = isinstance(name, str) and isinstance(folder, str) and folder
            rows.append((f"images[{number}]", (f"{folder}/{name}" if whole else name, each.get("sentences"))))
    ignored = {f"images of split {split}": count for split, count in splits.items() if split not in taken}
    notes = [f"splits {', '.join(taken)} are taken; --dataset packs the test images of COCO and Flickr30k"]
    return Rows(_PAIR, rows, ignored=ignored, notes=notes if ignored else [])


def _record_rows(path: Path, content: Any) -> Rows:
    """A list of records, or an object of captions by image."""
    if isinstance(content, dict):
        lists = [key for key, value in content.items() if isinstance(value, list) and _are_records(value)]
        if len(lists) == 1 and not looks_like_an_image(lists[0]):
            return _record_rows(path, content[lists[0]])
        names = [name for name in content if looks_like_an_image(name)]
        if len(names) * 2 > len(content):
            return Rows(_PAIR, [(f"key {name!r}", (name, texts)) for name, texts in content.items()])
    if not isinstance(content, list) or not _are_records(content):
        found = f"an object of {few(list(content), 5)}" if isinstance(content, dict) else type(content).__name__
        raise ConfigError(
            f"{path}: names no images in a known way; COCO captions have 'images' and 'annotations', others are a list "
            f'of records, as in [{{"image": "a.jpg", "caption": "…"}}], or {{"a.jpg": "…"}}; found {found}'
        )
    columns = list(dict.fromkeys(key for each in content if isinstance(each, dict) for key in each))
    rows = [
        (f"record {number}", [each.get(column) if isinstance(each, dict) else None for column in columns])
        for number, each in enumerate(content, 1)
    ]
    return Rows(columns, rows)


def _are_records(value: Sequence[Any]) -> bool:
    return bool(value) and sum(isinstance(each, dict) for each in value) * 2 > len(value)
