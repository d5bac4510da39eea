"""Decoded and resized evaluation images, kept on this disk for all processes of a machine.

One set with one preprocessing is an entry of the cache (cache.py) with two files, which are sparse at first:

    NAME.pixels   image i, uint8 (3, H, W), at byte i * 3HW
    NAME.sums     8 bytes for each image: the sum of its pixels, taken as 64-bit words; 0 without an image

Their space is reserved beforehand (cache_budget.py), but nothing is locked. All writers of an image write the same
bytes, and an image counts only with its sum, so neither a killed writer nor a disk that lost a page can lead to pixels
other than the decoded ones. Training crops differ in each epoch and are not kept.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache as once
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor

from pipeline.data import images as image_code
from pipeline.data.storage.cache import Cache, entry_of
from pipeline.data.storage.cache_budget import PAGE, Promise, on_disk, room_to_decode, unwritten

SUM_BYTES = 8
# The cache takes at most half of the free disk space.
FREE_SHARE = 0.5


@dataclass(frozen=True)
class KeptPixels:
    """The images of one set that some process of this machine has decoded. Workers get copies.

    ``room`` is the reservation for them; without it nothing is read or written.
    """

    path: Path
    height: int
    width: int
    room: Promise | None = None

    @property
    def bytes(self) -> int:
        """Bytes of one image."""
        return 3 * self.height * self.width

    def takes(self, images: Sequence[int]) -> int:
        """Bytes of the disk that these images may need."""
        return on_disk(_pages(images, self.bytes)) + on_disk(_pages(images, SUM_BYTES))

    def missing(self, wanted: Sequence[int]) -> list[int]:
        """The images among `wanted` that are not stored yet."""
        try:
            sums = np.fromfile(self._sums, dtype="<u8")
        except FileNotFoundError:
            return list(wanted)
        return [i for i in wanted if i >= len(sums) or sums[i] == 0]

    def read_through(self, wanted: Sequence[int], decode: Callable[[int], Tensor]) -> tuple[Tensor, str]:
        """(len(wanted), 3, H, W) from the stored images, and from `decode(i)` for the rest, which is then stored.

        The text describes a fault of the disk, '' without one; the pixels are correct in any case.
        """
        found = torch.empty(len(wanted), 3, self.height, self.width, dtype=torch.uint8)
        trouble = ""
        try:
            with self._opened() as files:
                for image, i in zip(found, wanted, strict=True):
                    if not self._read(files, i, image.numpy()):
                        image.copy_(decode(i))
                        trouble = trouble or self._write(files, i, image.numpy())
        except OSError as error:
            return torch.stack([decode(i) for i in wanted]), self._trouble(error)
        return found, trouble

    def _trouble(self, error: OSError) -> str:
        return trouble_with(self.path.parents[2], error)

    @property
    def _sums(self) -> Path:
        return self.path.with_suffix(".sums")

    @contextmanager
    def _opened(self) -> Iterator[tuple[int, int]]:
        if self.room is None or not self.room.stands():
            raise OSError(errno.ENOSPC, "their space was used for fetched files")
        pixels = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            sums = os.open(self._sums, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                yield pixels, sums
            finally:
                os.close(sums)
        finally:
            os.close(pixels)

    def _read(self, files: tuple[int, int], i: int, image: Any) -> bool:
        stored = int.from_bytes(os.pread(files[1], SUM_BYTES, i * SUM_BYTES), "little")
        if stored == 0:
            return False
        return os.preadv(files[0], [image], i * self.bytes) == self.bytes and stored == _sum_of(image)

    def _write(self, files: tuple[int, int], i: int, image: Any) -> str:
        """Store an image completely or not at all; returns why it could not be stored."""
        try:
            if os.pwrite(files[0], image, i * self.bytes) < self.bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.pwrite(files[1], _sum_of(image).to_bytes(SUM_BYTES, "little"), i * SUM_BYTES)
        except OSError as error:
            return self._trouble(error)
        return ""


def open_pixels(cache: Cache, name: str, key: object, size: tuple[int, int], wanted: Sequence[int]) -> KeptPixels:
    """The entry for a set and a preprocessing, with space for the images `wanted`; the oldest used entries are removed.

    ``key`` holds everything that determines the pixels, except this code and its libraries. The reservation ends with
    the last reference to the result. Raises OSError if the disk is full.
    """
    text = repr((key, size, _code()))
    pixels = KeptPixels(entry_of(cache, "pixels", text, f"{name}.pixels"), *size)
    share = hashlib.sha256(np.asarray(wanted, dtype=np.int64).tobytes()).hexdigest()
    room = room_to_decode(cache, pixels.path.parent, lambda: pixels.takes(pixels.missing(wanted)), share)
    needed = pixels.bytes * len(pixels.missing(wanted))
    if room is None:
        allowed = f"SELORA_CACHE_GB allows {cache.max_bytes / 1e9:.3g} with all that is just being written"
        raise _no_room(needed, cache.directory, allowed)
    free = shutil.disk_usage(cache.directory).free
    if needed and unwritten(cache) > free * FREE_SHARE:
        room.close()
        raise _no_room(needed, cache.directory, f"and no more than half of the free {free / 1e9:.3g} is taken")
    pixels.path.parent.mkdir(parents=True, exist_ok=True)
    pixels.path.touch()  # used now
    return replace(pixels, room=room)


def _no_room(needed: int, where: Path, why: str) -> OSError:
    return OSError(errno.ENOSPC, f"the decoded images need {needed / 1e9:.3g} GB, {why}", str(where))


def _pages(numbers: Sequence[int], each: int) -> int:
    """Number of pages of a file that the records of ``each`` bytes with these numbers occupy."""
    ordered = np.unique(np.asarray(numbers, dtype=np.int64))
    first, last = ordered * each // PAGE, ((ordered + 1) * each - 1) // PAGE
    first[1:] = np.maximum(first[1:], last[:-1] + 1)
    return int((last - first + 1).sum())


def trouble_with(directory: Path, error: OSError) -> str:
    """A message for the user: why images are not kept, and that it does no harm."""
    return f"decoded images are not kept in {directory}: {error.strerror or error}; results are the same without"


def _sum_of(image: Any) -> int:
    """A sum that is never 0. It finds pages that a disk lost, ten times as fast as the standard library's crc32."""
    flat = image.reshape(-1)
    words = flat[: flat.size // 8 * 8].view("<u8")
    total = int(words.sum(dtype=np.uint64)) + int(flat[words.nbytes :].sum())
    return total % 2**64 or 1


@once
def _code() -> tuple[str, ...]:
    """What else determines the pixels: the libraries and the exact code that calls them."""
    source = Path(image_code.__file__).read_bytes()
    return PIL.__version__, torchvision.__version__, torch.__version__, hashlib.sha256(source).hexdigest()
