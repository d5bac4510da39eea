"""`selora inspect`: the content of a source, and the next command and config lines."""

from __future__ import annotations

import io
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from PIL import Image

from pipeline.config import ConfigError
from pipeline.data.image_files import DAMAGED, BadImageError, check_size
from pipeline.data.sources.account import MAX_UNREADABLE, Account, LeftOut
from pipeline.data.sources.classes import shown_mapping
from pipeline.data.sources.formats import read_source
from pipeline.data.sources.sample import Sample, Source, SourceOptions, few


@dataclass(frozen=True)
class Inspection:
    """Result of inspect. As text: counts, classes, five samples, and the next command and config lines.

    ``account`` leaves out what the reader left out, and those of the five that are unreadable; pack decodes all.
    """

    source: Source
    samples: list[str]
    account: Account
    command: str
    config: str

    def __str__(self) -> str:
        found = self.source
        lines = [f"{found.path}: {found.format}, {len(found.samples)} images"]
        if found.classes is not None:
            counts = Counter(sample.cls for sample in found.samples)
            sizes = sorted((counts[label], name) for label, name in enumerate(found.classes))
            lines.append(
                f"  {len(sizes)} classes, {sizes[0][0]} images ({sizes[0][1]}) to {sizes[-1][0]} ({sizes[-1][1]})"
            )
            lines += [f"  {line}" for line in shown_mapping(found.folders, found.classes)]
        own = [len(sample.captions) for sample in found.samples if sample.captions]
        if own:
            lines.append(f"  {sum(own)} captions, {min(own)} to {max(own)} per image")
        lines += ["samples:", *(f"  {sample}" for sample in self.samples)]
        lines += ["next:", f"  {self.command}", "config:", *(f"  {line}" for line in self.config.splitlines())]
        lines += [f"note: {note}" for note in (*found.notes, *self._doubts())]
        lines.append(self.account.text("to pack"))
        return "\n".join(lines)

    def _doubts(self) -> Iterator[str]:
        bad = len(self.account.left_out) - len(self.source.left_out)
        if bad:
            yield (
                f"{bad} of the {len(self.samples)} images that were opened cannot be read; pack decodes every image "
                f"and fails if more than --max-unreadable (default: {MAX_UNREADABLE:g}) are unreadable or missing"
            )


def inspect(source: str | Path, options: SourceOptions = SourceOptions()) -> Inspection:  # noqa: B008 - frozen
    """Inspect a source without writing anything.

    Raises:
        ConfigError: As in read_source, and when none of the images can be used.
    """
    found = read_source(source, options)
    if not found.samples:
        names = [str(each) for each in found.left_out]
        raise ConfigError(f"{found.path}: none of its {len(names)} images can be used: {few(names, 5)}")
    step = max(1, len(found.samples) // 5)
    looks = [(sample, _look(sample)) for sample in found.samples[::step][:5]]
    bad = [LeftOut(sample.name, "unreadable image") for sample, look in looks if look is None]
    account = found.account(bad)
    shards = f"shards/{re.sub(r'[^A-Za-z0-9_-]+', '-', found.path.resolve().stem)}"
    given = {each.name: value for each in fields(options) if (value := getattr(options, each.name)) != each.default}
    flags = [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in given.items()]
    flags += _allowance(found)
    command = " ".join(["selora pack", shlex.quote(str(source)), *flags, shlex.quote(shards)])
    lines = ["data:", f"  train: {shards}"]
    if any(not sample.captions for sample in found.samples):
        lines.append("  templates: openai  # sentences about the class; or a list of your own with {c}")
    if len(found.samples) < 5120:
        batch = max(8, 2 ** ((len(found.samples) // 10).bit_length() - 1))
        lines += [f"  streams: {min(64, batch)}", "train:", f"  global_batch_size: {batch}  # of few images"]
    samples = [_describe(sample, look, found.classes) for sample, look in looks]
    return Inspection(found, samples, account, command, "\n".join(lines))


def _allowance(source: Source) -> list[str]:
    """The flag without which pack would refuse a source that lacks images."""
    share = len(source.left_out) / (len(source.samples) + len(source.left_out))
    return [f"--max-unreadable {math.ceil(100 * share) / 100:g}"] if MAX_UNREADABLE < share < 1 else []


def _look(sample: Sample) -> str | None:
    """Format, size and mode of an image, None if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(sample.image.read_bytes())) as image:
            check_size(image.width, image.height)
            image.load()
            return f"{image.format} {image.width} x {image.height} {image.mode}"
    except (*DAMAGED, BadImageError):
        return None


def _describe(sample: Sample, look: str | None, classes: Sequence[str] | None) -> str:
    parts = [sample.name, look or "unreadable"]
    if sample.cls is not None and classes is not None:
        parts.append(f"class {sample.cls} {classes[sample.cls]!r}")
    if sample.captions:
        parts.append(f"{sample.captions[0]!r}")
    return " | ".join(parts)
