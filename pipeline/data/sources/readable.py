"""Which samples of a source can be packed, and by name and reason which cannot: nothing is dropped without a word."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.config import ConfigError
from pipeline.data.images import BadImageError, decode, stored_extension
from pipeline.data.sources.formats import Sample, Source
from pipeline.data.storage.tar import split_name

LISTED = 20


def usable_samples(
    data: Source, *, decoded: bool, max_unreadable: float, max_pixels: int, workers: int
) -> tuple[list[Sample], list[str]]:
    """The samples to pack, and "name: reason" of what is left out.

    ``decoded``: every image is decoded once. Raises ConfigError when more than the share ``max_unreadable`` is left
    out, and for keys that cannot stand in one tar.
    """
    _check_keys(data)
    bad = {s.key: "neither caption nor class" for s in data.samples if s.cls is None and not s.captions}
    bad |= _unreadable(data.samples, max_pixels, workers) if decoded else {}
    left_out = [f"{name}: missing file or caption" for name in data.missing]
    left_out += [f"{sample.name}: {bad[sample.key]}" for sample in data.samples if sample.key in bad]
    good = [sample for sample in data.samples if sample.key not in bad]
    total = len(data.samples) + len(data.missing)
    if good and len(left_out) <= max_unreadable * total:
        return good, left_out
    listed = "".join(f"\n  {line}" for line in left_out[:LISTED])
    more = f"\n  and {len(left_out) - LISTED} more" if len(left_out) > LISTED else ""
    allowed = f"--max-unreadable allows a share of {max_unreadable:g}" if max_unreadable else "none may be left out"
    raise ConfigError(
        f"{data.path}: {len(left_out)} of {total} images are unreadable or missing; {allowed}{listed}{more}"
    )


def _check_keys(data: Source) -> None:
    """A key that comes twice, or that a reader would split, makes samples that run into each other."""
    seen: dict[str, str] = {}
    for sample in data.samples:
        if split_name(f"{sample.key}.jpg")[0] != sample.key:
            raise ConfigError(f"{sample.name}: its key {sample.key!r} has a dot in its last part, where readers split")
        if sample.key in seen:
            raise ConfigError(f"{sample.name} and {seen[sample.key]} have the same key {sample.key!r}")
        seen[sample.key] = sample.name


def _unreadable(samples: Sequence[Sample], max_pixels: int, workers: int) -> dict[str, str]:
    """Reason by key of the images that do not decode. Decoders release the interpreter lock, so threads help."""

    def reason(sample: Sample) -> str | None:
        try:
            stored_extension(sample.image.suffix, sample.image.read_bytes)
            decode(sample.image.read_bytes(), max_pixels=max_pixels)
        except (BadImageError, OSError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(workers) as pool:
        return {s.key: why for s, why in zip(samples, pool.map(reason, samples), strict=True) if why is not None}
