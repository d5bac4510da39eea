"""Image bytes to pixels: decoding, the training crop and the evaluation resize, each in a fast and a reference form.

"reference" is Pillow throughout, in open_clip's order. "fast" decodes with torchvision and resizes uint8 tensors
(antialiased bicubic), about twice as fast and within two levels of the reference. Both give uint8 (3, H, W); the device
normalises (`normalize`). What torchvision cannot decode as Pillow does (CMYK, palettes, alpha, 16 bit, TIFF ..) goes
through Pillow in both forms, so the two never disagree on which images are bad.

Modes: alpha is dropped and palettes are expanded as Pillow's convert("RGB") does, which is what open_clip does; 16-bit
grey is scaled to 8 bit, where convert would clip it to white; an EXIF orientation is applied.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, decode_png
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as pil_functional
from torchvision.transforms.v2 import functional as fast_functional

Preprocessing = Literal["fast", "reference"]

# File extensions that hold an image, and the one each is stored under in a shard. webdataset splits a name at its first
# dot and its readers, like clip_benchmark's, know these few.
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
}
STORED_EXTENSIONS = tuple(dict.fromkeys(IMAGE_EXTENSIONS.values()))

_ORIENTATION = 0x0112
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")


class BadImage(Exception):
    """This image cannot be used; the message says why, without its name."""


def decode(data: bytes, *, form: Preprocessing = "fast", max_pixels: int = 2**28) -> Tensor | Image.Image:
    """An upright RGB image: a uint8 tensor (3, H, W) in the fast form, a Pillow image in the reference form.

    Raises BadImage for what is no image, is cut off, or has more than ``max_pixels`` pixels.
    """
    try:
        with _quiet_pillow(), Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > max_pixels:
                raise BadImage(f"{image.width} x {image.height} pixels are more than max_pixels={max_pixels}")
            if form == "fast" and (fast := _decode_fast(image, data)) is not None:
                return fast
            upright = _to_rgb(image)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not an image" if data else "no bytes") from error
    except (OSError, SyntaxError, ValueError, RuntimeError, EOFError, IndexError, TypeError) as error:
        # Pillow's plugins and torchvision raise these for damaged files; anything else is a bug and shall be seen.
        raise BadImage(
            f"cannot be decoded: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    return upright if form == "reference" else pil_functional.pil_to_tensor(upright)


def train_crop(
    image: Tensor | Image.Image, size: int | tuple[int, int], *, scale: tuple[float, float], seed: int
) -> Tensor:
    """The random crop of training, resized bicubically: uint8 (3, H, W). Equal seeds and sizes give equal crops."""
    with _torch_seed(seed):
        box = RandomResizedCrop.get_params(image, scale=list(scale), ratio=[3.0 / 4.0, 4.0 / 3.0])  # type: ignore[arg-type]
    height_width = _pair(size)
    if isinstance(image, Tensor):
        return fast_functional.resized_crop(image, *box, list(height_width), InterpolationMode.BICUBIC, antialias=True)
    cropped = pil_functional.resized_crop(image, *box, list(height_width), InterpolationMode.BICUBIC)  # type: ignore[arg-type]
    return pil_functional.pil_to_tensor(cropped)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, 3, H, W) to float32, equal to ToTensor and Normalize, on the device the images are on."""
    shape = (1, -1, 1, 1)
    mean_ = torch.tensor(mean, dtype=torch.float32, device=images.device).view(shape)
    std_ = torch.tensor(std, dtype=torch.float32, device=images.device).view(shape)
    return images.to(torch.float32).div_(255).sub_(mean_).div_(std_)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return int(size[0]), int(size[1])


def _decode_fast(image: Image.Image, data: bytes) -> Tensor | None:
    """torchvision's pixels where they are Pillow's; None for the rest."""
    if image.mode not in ("RGB", "L") or "transparency" in image.info:
        return None
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if image.format in ("JPEG", "MPO"):
        return decode_jpeg(raw, mode=ImageReadMode.RGB, apply_exif_orientation=True)  # type: ignore[return-value]
    if image.format == "PNG" and "exif" not in image.info:
        return decode_png(raw, mode=ImageReadMode.RGB)
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode in _DEEP_MODES:
        deep = np.asarray(image).astype(np.float64)
        top = 65535 if image.mode != "I" or deep.max(initial=0) > 255 else 255
        image_8bit = Image.fromarray(np.clip(np.rint(deep * (255 / top)), 0, 255).astype(np.uint8), "L")
        orientation = image.getexif().get(_ORIENTATION)
        if orientation:
            image_8bit.getexif()[_ORIENTATION] = orientation
        return ImageOps.exif_transpose(image_8bit).convert("RGB")
    if image.mode == "F":
        raise BadImage("floating point pixels have no agreed range; save it with 8 or 16 bit")
    return ImageOps.exif_transpose(image).convert("RGB")


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Without Pillow's own size limit (ours is max_pixels) and its warnings on odd metadata."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _torch_seed(seed: int) -> Iterator[None]:
    """torch's CPU generator at ``seed``; its state comes back afterwards. (torch.manual_seed would touch CUDA's too.)"""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
