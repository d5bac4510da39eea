"""Features of the untouched model on reference data, computed once and kept in the machine's cache.

An entry of the cache (storage/cache.py) holds the features of one shard, or of one list of texts. Its name follows from
everything that determines them: the untouched model, the content and the preprocessing. So trials and ranks share them,
and after a kill only the incomplete entry is computed again.
"""

from __future__ import annotations

import errno
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.batches import Batches
from pipeline.data.images import STORED_EXTENSIONS, BadImageError, Preprocessing, decode, eval_resize
from pipeline.data.order import stable_hash
from pipeline.data.shards.index import ShardIndex, open_shard
from pipeline.data.shards.members import sample_texts
from pipeline.data.storage.cache import Cache, entry_of, lock_of, touch
from pipeline.data.storage.cache_budget import room_to_decode
from pipeline.data.storage.tar import TarIndex

# Version of the entries; a new number recomputes them.
VERSION = 1
# Samples per forward: a constant, so that an entry does not depend on the process that computed it.
ROWS = 64

logger = logging.getLogger("selora.data")


@dataclass(frozen=True)
class Untouched:
    """The parts of the untouched model that features need.

    Attributes:
        images: uint8 (B, 3, H, W) -> fp32 unit vectors (B, D) on the CPU.
        texts: tokens (B, context) -> the same; None for a model without a text tower.
        tokenize: N texts -> tokens (N, context); None with `texts`.
        preprocess: its image preprocessing (see `eval_resize`).
        identity: distinguishes this model from all others.
    """

    images: Callable[[Tensor], Tensor]
    texts: Callable[[Tensor], Tensor] | None
    tokenize: Callable[[list[str]], Tensor] | None
    preprocess: dict[str, Any]
    identity: tuple[Any, ...]


@dataclass(frozen=True)
class Reading:
    """How reference images are read: as in evaluation, in the fast or the reference form."""

    preprocess: dict[str, Any]
    form: Preprocessing
    max_pixels: int

    def pixels(self, data: bytes) -> Tensor:
        """Image bytes -> uint8 (3, H, W). Raises BadImageError."""
        return eval_resize(decode(data, form=self.form, max_pixels=self.max_pixels), self.preprocess)


def stored_image(tar: TarIndex, number: int) -> bytes:
    """The stored image of sample `number`. Raises BadImageError without an image."""
    members = tar.samples[number].members
    ext = next((ext for ext in STORED_EXTENSIONS if ext in members), None)
    if ext is None:
        raise BadImageError(f"no image among its members ({', '.join(sorted(members))})")
    return tar.read(number, ext)


def text_features(cache: Cache, untouched: Untouched, texts: Sequence[str]) -> dict[str, Tensor]:
    """Features of a list of texts.

    Returns:
        tokens (N, context) int32 and features (N, D) fp32.
    """
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return _kept(cache, untouched, ("texts", digest), lambda: _encode_texts(untouched, list(texts)))


def image_features(
    cache: Cache, untouched: Untouched, index: ShardIndex, reading: Reading, *, workers: int, first: int = 0
) -> list[dict[str, Tensor]]:
    """Features of every reference image and caption, by shard.

    Args:
        workers: number of decoding processes.
        first: number of the shard to begin with. Ranks that begin with different shards share the work: a shard that
            another process is computing comes last.

    Returns:
        For each of the n samples of a shard: image (n, D) fp32, zeros where it is bad; good (n,) bool; key (n,) int64,
        a hash of its key; content (n,) int64, a hash of the image file. For its m captions: tokens (m, context) int32
        and caption (m, D) fp32; those of sample i are the rows from captions[i] to captions[i + 1], captions being
        (n + 1,) int64.
    """

    def make(number: int) -> Callable[[], dict[str, Tensor]]:
        return lambda: _encode_shard(untouched, index, number, reading, workers)

    def key(number: int) -> tuple[Any, ...]:
        return "shard", index.shards[number].sha256, reading.form, reading.max_pixels

    count = len(index.shards)
    for turn in range(count):
        number = (first + turn) % count
        _kept(cache, untouched, key(number), make(number), wait=False)
    return [_kept(cache, untouched, key(number), make(number)) for number in range(count)]


def _kept(
    cache: Cache,
    untouched: Untouched,
    key: tuple[Any, ...],
    compute: Callable[[], dict[str, Tensor]],
    *,
    wait: bool = True,
) -> dict[str, Tensor]:
    """The entry, computed if it is missing; without `wait` None while another process is computing it."""
    entry = entry_of(cache, "reference", repr((VERSION, *untouched.identity, *key)), "features.safetensors")
    try:
        with FileLock(lock_of(cache, entry), blocking=wait):
            if touch(entry):
                try:
                    return load_file(entry)
                except (OSError, SafetensorError):
                    logger.warning("%s: damaged, computed again", entry)
            found = compute()
            _write(cache, entry, found)
            return found
    except Timeout:
        return {}
    except OSError as error:
        logger.warning("features of the reference data are not kept in %s: %s", cache.directory, error)
        return compute()


def _write(cache: Cache, entry: Path, found: dict[str, Tensor]) -> None:
    size = sum(each.nbytes for each in found.values())
    room = room_to_decode(cache, entry.parent, lambda: size, entry.parent.name)
    if room is None:
        raise OSError(errno.ENOSPC, "SELORA_CACHE_GB is too small for them", str(entry))
    with room:
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = entry.with_suffix(".part")
        save_file(found, partial)
        partial.replace(entry)


def _encode_texts(untouched: Untouched, texts: list[str]) -> dict[str, Tensor]:
    if not texts or untouched.texts is None or untouched.tokenize is None:
        return {"tokens": torch.zeros(0, 0, dtype=torch.int32), "features": torch.zeros(0, 0)}
    tokens = untouched.tokenize(texts)
    features = torch.cat([untouched.texts(part) for part in tokens.split(ROWS)])
    return {"tokens": tokens.to(torch.int32), "features": features}


@dataclass(frozen=True)
class _Part:
    """Some samples of a shard as read from it, with pixels of the good ones only."""

    pixels: Tensor
    good: list[bool]
    keys: list[int]
    contents: list[int]
    captions: list[list[str]]


@dataclass(frozen=True)
class _ReadPart:
    index: ShardIndex
    shard: int
    reading: Reading

    def __call__(self, numbers: Sequence[int]) -> _Part:
        tar = open_shard(self.index, self.shard)
        pixels, good, contents, captions = [], [], [], []
        for number in numbers:
            try:
                data = stored_image(tar, number)
                pixels.append(self.reading.pixels(data))
                texts = sample_texts(tar, number, self.index.classes)[1]
                good.append(True)
            except BadImageError:
                data, texts = b"", []
                good.append(False)
            contents.append(content_hash(data))
            captions.append(texts)
        keys = [stable_hash("keep", tar.samples[number].key) for number in numbers]
        tar.close()
        stacked = torch.stack(pixels) if pixels else torch.empty(0, dtype=torch.uint8)
        return _Part(stacked, good, keys, contents, captions)


def content_hash(data: bytes) -> int:
    """63 bits of an image file's content."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") >> 1


def _encode_shard(
    untouched: Untouched, index: ShardIndex, number: int, reading: Reading, workers: int
) -> dict[str, Tensor]:
    count = index.shards[number].samples
    plan = [range(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]
    parts = list(Batches(_ReadPart(index, number, reading), plan, workers=min(workers, len(plan))))
    good = torch.tensor([each for part in parts for each in part.good])
    captions = [texts for part in parts for texts in part.captions]
    encoded = _encode_texts(untouched, [text for texts in captions for text in texts])
    features = [untouched.images(part.pixels) for part in parts if len(part.pixels)]
    if not features:
        raise ConfigError(
            f"keep.images={index.folder.location}: no image of {index.shards[number].name} can be read; "
            "`selora verify` lists the faults"
        )
    image = torch.zeros(count, features[0].shape[1])
    image[good] = torch.cat(features)
    return {
        "image": image,
        "good": good,
        "key": torch.tensor([each for part in parts for each in part.keys]),
        "content": torch.tensor([each for part in parts for each in part.contents]),
        "captions": torch.tensor([0] + [len(texts) for texts in captions]).cumsum(0),
        "tokens": encoded["tokens"],
        "caption": encoded["features"],
    }
