"""Image bytes to pixels: decoding, the training crop and the evaluation resize, each in a fast and a reference form.

"reference" is Pillow throughout, in open_clip's order. "fast" decodes JPEG and WebP with torchvision and resizes uint8
tensors (antialiased), about twice as fast and within two levels of the reference. Both give uint8 (3, H, W), and
`normalize` makes floats of them on the device.

Unusual images: alpha is dropped and a palette is expanded by Pillow's convert("RGB"), as in open_clip; 16-bit grey is
scaled to 8 bit, because convert would clip it to white; an EXIF orientation is applied.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, decode_webp
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as annotated_functional

from pipeline.config import ConfigError
from pipeline.data.image_files import (
    DAMAGED,
    IMAGE_EXTENSIONS,
    MAX_PIXELS,
    STORED_EXTENSIONS,
    BadImageError,
    check_size,
    stored_extension,
)

__all__ = [
    "IMAGE_EXTENSIONS",
    "MAX_PIXELS",
    "STORED_EXTENSIONS",
    "BadImageError",
    "Pixels",
    "Preprocessing",
    "Resize",
    "decode",
    "eval_resize",
    "looks_the_same_to_all",
    "normalize",
    "size_pair",
    "stored_extension",
    "train_crop",
    "with_resize",
    "without_border",
]

Preprocessing = Literal["fast", "reference"]
# A resize other than the model's own: see `with_resize`.
Resize = Literal["squash"] | int
Pixels = Tensor | Image.Image
# These functions take Pillow images as well as tensors, although their annotations name only tensors.
functional: Any = annotated_functional

_ORIENTATION = 0x0112
# Aspect ratio of a training crop.
_RATIO = (3 / 4, 4 / 3)
_LOG_RATIO = torch.tensor(_RATIO).log().tolist()
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def decode(
    data: bytes, *, form: Preprocessing = "fast", max_pixels: int = MAX_PIXELS, as_stored: bool = False
) -> Pixels:
    """An upright RGB image: a uint8 tensor (3, H, W) in the fast form, a Pillow image in the reference form.

    A JPEG's pixels stay in the decoder's layout, with the channels of a pixel next to each other, which makes the
    resize faster.

    ``as_stored`` is plain convert("RGB"), for published numbers, because other readers ignore orientation and depth.
    Raises BadImageError for data that is not an image, is cut off, has more than ``max_pixels`` pixels, or has an
    extreme aspect ratio (image_files.check_size).
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_size(image.width, image.height, max_pixels)
            fast = _decode_fast(image, data) if form == "fast" else None
            if fast is not None:
                return fast if as_stored else _upright(fast, _orientation(image))
            rgb = image.convert("RGB") if as_stored else _to_rgb(image)
    except UnidentifiedImageError as error:
        raise BadImageError("not an image" if data else "no bytes") from error
    except DAMAGED as error:
        raise BadImageError(
            f"cannot be decoded ({str(error).partition(chr(10))[0] or type(error).__name__})"
        ) from error
    return functional.pil_to_tensor(rgb) if form == "fast" else rgb


def looks_the_same_to_all(data: bytes) -> bool:
    """Whether a reader that ignores orientation and depth sees what `decode` shows. Raises BadImageError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.mode not in (*_DEEP_MODES, "F") and _orientation(image) == 1
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImageError("not an image" if data else "no bytes") from error


def train_crop(image: Pixels, size: int | Sequence[int], *, scale: tuple[float, float], seed: int) -> Tensor:
    """The random crop of training, resized bicubically: uint8 (3, H, W). Equal seed and image size give equal crops."""
    _, height, width = functional.get_dimensions(image)
    box, how = _crop_box(height, width, scale, seed), InterpolationMode.BICUBIC
    return _tensor(functional.resized_crop(image, *box, list(size_pair(size)), how, antialias=True))


def eval_resize(image: Pixels, cfg: Mapping[str, Any]) -> Tensor:
    """The resize of open_clip's `image_transform(is_train=False)`: uint8 (3, H, W).

    ``cfg`` is open_clip's preprocessing: size (int or (H, W)), interpolation, resize_mode shortest | longest | squash.
    With ``shorter_side`` (see `with_resize`) the image is resized to it and cropped at the centre.
    """
    height, width = size_pair(cfg["size"])
    how = InterpolationMode(cfg.get("interpolation", "bicubic"))
    if how not in (InterpolationMode.BICUBIC, InterpolationMode.BILINEAR):
        raise ConfigError(f"preprocessing: interpolation {how.value!r} is neither bicubic nor bilinear")
    mode = cfg.get("resize_mode", "shortest")
    if mode == "squash":
        return _tensor(functional.resize(image, [height, width], how, antialias=True))
    if mode == "longest":
        resized = _resize_keeping_ratio(image, height, width, max, how)
        return _tensor(_center_crop_or_pad(resized, height, width, int(cfg.get("fill_color", 0))))
    if mode != "shortest":
        raise ConfigError(f"preprocessing: resize_mode {mode!r} is none of shortest, longest, squash")
    if height == width or "shorter_side" in cfg:
        resized = functional.resize(image, [cfg.get("shorter_side", height)], how, antialias=True)
    else:
        # open_clip does not pass on its interpolation here.
        resized = _resize_keeping_ratio(image, height, width, min, InterpolationMode.BICUBIC)
    return _tensor(functional.center_crop(resized, [height, width]))


def with_resize(cfg: Mapping[str, Any], resize: Resize | None) -> dict[str, Any]:
    """A model's preprocessing with another resize.

    resize: "squash" to the model's size, whatever the image's shape; pixels of the shorter side, followed by a centre
    crop to the model's size; None: unchanged.

    Raises ConfigError if the result would be smaller than the model's input.
    """
    if resize is None:
        return dict(cfg)
    if resize == "squash":
        return {**cfg, "resize_mode": "squash"}
    size = size_pair(cfg["size"])
    if resize < max(size):
        raise ConfigError(f"resize: {resize} is less than the {max(size)} pixels that the model takes; give it more")
    return {**cfg, "resize_mode": "shortest", "shorter_side": resize}


def without_border(image: Pixels, border: int) -> Pixels:
    """The image without its outermost ``border`` pixels on each side. Raises BadImageError if nothing is left."""
    if border == 0:
        return image
    _, height, width = functional.get_dimensions(image)
    if min(height, width) <= 2 * border:
        raise BadImageError(f"{width} x {height} pixels, nothing left without a border of {border}")
    return functional.crop(image, border, border, height - 2 * border, width - 2 * border)


def size_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) of a size that is one number or two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, 3, H, W) to float32, bit for bit like ToTensor and Normalize, on the images' device."""
    mean_, std_ = (torch.tensor(v, dtype=torch.float32, device=images.device).view(1, -1, 1, 1) for v in (mean, std))
    return images.to(torch.float32).div_(255).sub_(mean_).div_(std_)


def _tensor(image: Pixels) -> Tensor:
    return image if isinstance(image, Tensor) else functional.pil_to_tensor(image)


def _decode_fast(image: Image.Image, data: bytes) -> Tensor | None:
    """torchvision's pixels for the formats in which they equal Pillow's; None for other formats.

    PNG is excluded: torchvision 0.29 crashes with a segmentation fault on a PNG with damaged data.
    """
    # The decoders can use a read-only buffer, but frombuffer warns about it.
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        decoder = decode_jpeg
    elif image.format == "WEBP" and image.mode == "RGB" and image.info.get("loop") is None:
        decoder = decode_webp
    else:
        return None
    try:
        return cast(Tensor, decoder(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB))
    except RuntimeError:
        return None  # Pillow decides whether the image is bad, and has a better message


def _orientation(image: Image.Image) -> int:
    """1 to 8 as in EXIF (or XMP), 1 if it is missing or invalid."""
    if not {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"} & image.info.keys():
        return 1
    value = image.getexif().get(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _upright(image: Tensor, orientation: int) -> Tensor:
    """(3, H, W) rotated and flipped as by Pillow's exif_transpose."""
    if orientation >= 5:
        image = image.transpose(1, 2)
    # After transposition, 5..8 need the same flips as 1, 2, 4 and 3, in this order.
    flips = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation)
    return image.flip(flips) if flips else image


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "F":
        raise BadImageError("floating point pixels have no agreed range; save it with 8 or 16 bit")
    upright = ImageOps.exif_transpose(image)
    if upright.mode in _DEEP_MODES:
        deep = np.asarray(upright).astype(np.float64)
        top = 255 if upright.mode == "I" and deep.max(initial=0) <= 255 else 65535
        upright = Image.fromarray(np.clip(np.rint(deep * (255 / top)), 0, 255).astype(np.uint8))
    return upright.convert("RGB")


def _resize_keeping_ratio(image: Pixels, height: int, width: int, pick: Any, how: InterpolationMode) -> Pixels:
    _, h, w = functional.get_dimensions(image)
    ratio = pick(h / height, w / width)
    # A side of a long image may round to 0, which no resize accepts.
    return functional.resize(image, [max(1, round(h / ratio)), max(1, round(w / ratio))], how, antialias=True)


def _center_crop_or_pad(image: Pixels, height: int, width: int, fill: int) -> Pixels:
    _, h, w = functional.get_dimensions(image)
    more_h, more_w = max(0, height - h), max(0, width - w)
    if more_h or more_w:
        image = functional.pad(image, [more_w // 2, more_h // 2, (more_w + 1) // 2, (more_h + 1) // 2], fill=fill)
    return functional.center_crop(image, [height, width])


def _crop_box(height: int, width: int, scale: tuple[float, float], seed: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of torchvision's RandomResizedCrop under ``seed``, number for number.

    Its own method draws from torch's global state and takes a tenth of the decoding time.
    """
    draws, one = torch.Generator().manual_seed(seed), torch.empty(1)
    for _ in range(10):
        area = height * width * one.uniform_(*scale, generator=draws).item()
        ratio = one.uniform_(*_LOG_RATIO, generator=draws).exp_().item()
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top, left = (int(torch.randint(most + 1, (1,), generator=draws)) for most in (height - h, width - w))
            return top, left, h, w
    h, w = min(height, round(width / _RATIO[0])), min(width, round(height * _RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w
