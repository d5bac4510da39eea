"""Captions and label of a sample from its members, written by selora or other tools."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import ConfigError
from pipeline.config.text_file import decode_text, parse_json
from pipeline.data.image_files import BadImageError
from pipeline.data.storage.tar import TarIndex


def sample_texts(tar: TarIndex, number: int, classes: Sequence[str] | None) -> tuple[int, list[str]]:
    """The label of a sample and its own captions.

    Args:
        tar: The shard.
        number: Number of the sample in it.
        classes: Names by label; None if samples have captions only and labels do not count.

    Returns:
        The label, -1 without one, and the captions in ``txt``, or else in ``json``; there may be none.

    Raises:
        BadImageError: For a label without a class and for captions that are not UTF-8.
    """
    members = tar.samples[number].members
    label = -1
    if "cls" in members:
        raw = tar.read(number, "cls").strip()
        if raw.isdigit() and (classes is None or int(raw) < len(classes)):
            label = int(raw)
        elif classes is not None:
            raise BadImageError(f"its class {raw[:20].decode('utf-8', 'replace')!r} is not in the index")
    try:
        if "txt" in members:
            return label, caption_lines(tar.read(number, "txt"), "its txt member")
        if "json" in members:
            return label, json_captions(decode_text(tar.read(number, "json"), "its json member"), "its json member")
    except ConfigError as error:
        raise BadImageError(str(error)) from None
    return label, []


def caption_member(captions: Sequence[str]) -> bytes:
    """A txt member, one caption per line.

    A line end inside a caption is written as ``\\n``, as in clip-benchmark's own sets, and stays two characters for
    every reader; only published captions contain such line ends.
    """
    return "\n".join(text.replace("\n", "\\n") for text in captions).encode()


def caption_lines(data: bytes, name: str) -> list[str]:
    """The captions in a txt member, one per line, exactly as stored; blank lines are ignored.

    Raises:
        ConfigError: When ``name``, as messages call it, is not UTF-8.
    """
    lines = (line.removesuffix("\r") for line in decode_text(data, name).split("\n"))
    return [line for line in lines if line.strip()]


def json_captions(text: str, name: str) -> list[str]:
    """The value of ``caption`` or ``captions``, a string or a list of them, in a JSON object; empty without either.

    Raises:
        ConfigError: When ``name``, as messages call it, is not JSON.
    """
    content = parse_json(text, name)
    found = content.get("caption", content.get("captions")) if isinstance(content, dict) else None
    listed = found if isinstance(found, list) else [found]
    return [clean for each in listed if isinstance(each, str) and (clean := " ".join(each.split()))]
