"""The samples of a source that can be packed; the others are listed with name and reason, none is dropped silently."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.config import ConfigError
from pipeline.data.images import BadImageError, decode, stored_extension
from pipeline.data.sources.account import Account, LeftOut
from pipeline.data.sources.sample import Sample, Source
from pipeline.data.storage.tar import split_name

LISTED = 20


def usable_samples(
    data: Source, *, decoded: bool, max_unreadable: float, max_pixels: int, workers: int
) -> tuple[list[Sample], Account]:
    """The samples to pack, and the account of the whole source.

    Args:
        data: The source.
        decoded: Whether to decode every image once.
        max_unreadable: Largest share of the images that may be left out.
        max_pixels: An image with more pixels is left out.
        workers: Decoding threads.

    Returns:
        The samples that can be packed, in the order of the source, and its account.

    Raises:
        ConfigError: When too many are left out, or for keys that cannot be in the same tar.
    """
    _check_keys(data)
    bad = {
        s.key: LeftOut(s.name, "neither caption nor class") for s in data.samples if s.cls is None and not s.captions
    }
    bad |= _unreadable(data.samples, max_pixels, workers) if decoded else {}
    account = data.account([bad[sample.key] for sample in data.samples if sample.key in bad])
    good = [sample for sample in data.samples if sample.key not in bad]
    total = account.packed + len(account.left_out)
    if good and len(account.left_out) / total <= max_unreadable:
        return good, account
    listed = "".join(f"\n  {line}" for line in account.left_out[:LISTED])
    more = f"\n  and {len(account.left_out) - LISTED} more" if len(account.left_out) > LISTED else ""
    allowed = f"--max-unreadable allows a share of {max_unreadable:g}" if max_unreadable else "none may be left out"
    raise ConfigError(
        f"{data.path}: {len(account.left_out)} of {total} images are unreadable or missing; {allowed}{listed}{more}"
    )


def _check_keys(data: Source) -> None:
    """Refuse repeated keys and keys that a reader would split, because their samples would be merged."""
    seen: dict[str, str] = {}
    for sample in data.samples:
        if split_name(f"{sample.key}.jpg")[0] != sample.key:
            raise ConfigError(f"{sample.name}: its key {sample.key!r} has a dot in its last part, where readers split")
        if sample.key in seen:
            raise ConfigError(f"{sample.name} and {seen[sample.key]} have the same key {sample.key!r}")
        seen[sample.key] = sample.name


def _unreadable(samples: Sequence[Sample], max_pixels: int, workers: int) -> dict[str, LeftOut]:
    """The images that cannot be decoded, by key. Decoders release the interpreter lock, so threads help."""

    def fault(sample: Sample) -> LeftOut | None:
        try:
            stored_extension(sample.image.suffix, sample.image.read_bytes)
            decode(sample.image.read_bytes(), max_pixels=max_pixels)
        except (BadImageError, OSError) as error:
            return LeftOut(sample.name, "unreadable image", str(error))
        return None

    with ThreadPoolExecutor(workers) as pool:
        return {s.key: found for s, found in zip(samples, pool.map(fault, samples), strict=True) if found is not None}
