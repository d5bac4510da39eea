"""Image files: which ones count, and checks before their pixels are decoded; does not import torch."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image, features

# File extensions of images, and the one under which each is stored in a shard.
IMAGE_EXTENSIONS = {
    "jpg": "jpg",
    "jpeg": "jpg",
    "jpe": "jpg",
    "jfif": "jpg",
    "png": "png",
    "webp": "webp",
    "bmp": "bmp",
    "gif": "gif",
    "tif": "tif",
    "tiff": "tif",
} | ({"avif": "avif", "avifs": "avif"} if features.check("avif") else {})
# All spellings, for shards of other tools.
STORED_EXTENSIONS = tuple(IMAGE_EXTENSIONS)
# Files with images that are not read here; a note says that they were not packed.
# fmt: off
UNREAD_EXTENSIONS = frozenset((
    "avif", "avifs", "heic", "heif", "jp2", "j2k", "jpx", "jpf", "jxl", "psd", "svg", "exr", "ico", "tga", "ppm", "pgm",
    "dng", "cr2", "cr3", "nef", "arw", "raw", "zip", "tar", "gz", "tgz", "7z", "rar", "parquet", "tfrecord", "h5",
)) - set(IMAGE_EXTENSIONS)
# fmt: on

MAX_PIXELS = 2**28
# The evaluation resize brings the shorter side to the model's size, so a line of 60,000 x 1 pixels would take 9 GB.
MAX_RATIO = 400

# Pillow's own limit is global for the process and lower than this one, which is an argument of `decode` and checked
# before any pixel is decoded. So Pillow's limit is lifted.
Image.MAX_IMAGE_PIXELS = None


# Exceptions of Pillow's plugins for damaged files; any other is a bug and should be seen.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, OverflowError)


class BadImageError(Exception):
    """This image cannot be used; the message says why, and the caller knows its name."""


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise BadImageError for an image with too many pixels or an extreme aspect ratio."""
    if width * height > max_pixels:
        raise BadImageError(f"{width} x {height} pixels, more than the limit of {max_pixels}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadImageError(f"{width} x {height} pixels, a side more than {MAX_RATIO} times as long as the other")


def stored_extension(suffix: str, read: Callable[[], bytes]) -> str:
    """The extension under which an image file is stored: by its suffix, otherwise by content.

    Args:
        suffix: with its dot, as in ``Path.suffix``.
        read: returns the bytes of the file; called if the suffix is not that of an image.

    Raises:
        BadImageError: the file is not of a stored image format.
    """
    by_name = IMAGE_EXTENSIONS.get(suffix[1:].lower())
    if by_name is not None:
        return by_name
    try:
        with Image.open(io.BytesIO(read())) as image:
            kind = (image.format or "").lower().replace("mpo", "jpeg")
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImageError("not an image") from error
    if kind not in IMAGE_EXTENSIONS:
        raise BadImageError(f"{kind} images are not stored; convert it to jpg, png or webp")
    return IMAGE_EXTENSIONS[kind]
