"""Pixels: the fast form against Pillow, Pillow against open_clip, and unusual images."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, image_transform
from PIL import Image, features
from requirements import lacking
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from pipeline.config import ConfigError
from pipeline.data.images import (
    BadImageError,
    Pixels,
    decode,
    eval_resize,
    looks_the_same_to_all,
    normalize,
    stored_extension,
    train_crop,
)

Photo = Callable[..., Image.Image]
Encode = Callable[..., bytes]


def tensor(image: Pixels) -> Tensor:
    return image if isinstance(image, Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


def levels(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


def both(data: bytes) -> Tensor:
    """The pixels of both forms, which must be the same ones: the forms differ in the resize only."""
    fast, reference = tensor(decode(data)), tensor(decode(data, form="reference"))
    assert torch.equal(fast, reference)
    assert fast.dtype == torch.uint8
    return fast


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "BMP", "GIF", "TIFF"])
def test_both_forms_decode_every_format_to_the_same_pixels(photo: Photo, encode: Encode, kind: str) -> None:
    image = photo(1)
    pixels = both(encode(image, kind))
    assert pixels.shape == (3, 40, 48)
    assert levels(pixels, tensor(image)) < 70


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_variants(photo: Photo, encode: Encode, options: dict[str, object]) -> None:
    both(encode(photo(2, 61, 47), "JPEG", **options))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "YCbCr"])
def test_other_modes_look_as_pillow_converts_them(photo: Photo, encode: Encode, mode: str) -> None:
    image = photo(3).convert(mode)
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    data = encode(image, kind)
    assert levels(both(data), tensor(image.convert("RGB"))) <= (40 if kind == "JPEG" else 0)


def test_alpha_is_dropped_as_open_clip_drops_it(photo: Photo, encode: Encode) -> None:
    image = photo(4).convert("RGBA")
    image.putalpha(0)
    assert torch.equal(both(encode(image, "PNG")), tensor(photo(4)))


def test_16_bit_grey_is_scaled_and_not_clipped_to_white(encode: Encode) -> None:
    ramp = np.linspace(0, 65535, 40 * 48).reshape(40, 48).astype(np.uint16)
    data = encode(Image.fromarray(ramp), "PNG")
    pixels = both(data)
    expected = torch.from_numpy(np.rint(ramp / 257).astype(np.int32))
    assert (pixels.int() - expected).abs().max() == 0
    assert not looks_the_same_to_all(data)
    assert (tensor(decode(data, as_stored=True)) == 255).float().mean() > 0.9


@pytest.mark.parametrize(("orientation", "kind"), itertools.product(range(1, 9), ["JPEG", "WEBP", "PNG"]))
def test_exif_orientation_is_applied(photo: Photo, encode: Encode, orientation: int, kind: str) -> None:
    upright = photo(5)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, kind, exif=exif, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    assert float((both(data).float() - tensor(upright).float()).abs().mean()) < 8
    assert looks_the_same_to_all(data) == (orientation == 1)
    assert tensor(decode(data, as_stored=True)).shape == (3, stored.height, stored.width)


def broken(photo: Photo, encode: Encode) -> dict[str, bytes]:
    jpeg, png, webp = (encode(photo(6), kind) for kind in ("JPEG", "PNG", "WEBP"))
    damaged_png, damaged_header = bytearray(png), bytearray(jpeg)
    damaged_png[len(png) // 2] ^= 0xFF
    damaged_header[4:300] = bytes(296)
    return {
        "cut jpeg": jpeg[: len(jpeg) // 2],
        "cut jpeg end": jpeg[:-2],
        "cut png": png[: len(png) // 2],
        "cut webp": webp[: len(webp) // 2],
        "damaged png": bytes(damaged_png),
        "damaged header": bytes(damaged_header),
        "text": b"<html>404 Not Found</html>",
        "nothing": b"",
    }


def test_broken_images_are_bad_in_both_forms_with_a_reason(photo: Photo, encode: Encode) -> None:
    for name, data in broken(photo, encode).items():
        for form in ("fast", "reference"):
            with pytest.raises(BadImageError) as caught:
                decode(data, form=form)
            assert str(caught.value), name
    with pytest.raises(BadImageError, match="not an image"):
        decode(broken(photo, encode)["text"])
    with pytest.raises(BadImageError, match="no bytes"):
        decode(b"")


def test_damaged_jpegs_are_noticed_by_both_forms(photo: Photo, encode: Encode) -> None:
    """No damage to a JPEG crashes or goes unnoticed by one form alone."""
    data, draw = encode(photo(7), "JPEG", quality=85), np.random.default_rng(0)
    outcomes = {"good": 0, "bad": 0}
    for _ in range(300):
        damaged = bytearray(data)
        for at in draw.integers(2, len(data), draw.integers(1, 4)):
            damaged[at] = draw.integers(256)
        try:
            reference = tensor(decode(bytes(damaged), form="reference", max_pixels=10**6))
        except BadImageError:
            outcomes["bad"] += 1
            continue
        assert torch.equal(reference, tensor(decode(bytes(damaged), max_pixels=10**6)))
        outcomes["good"] += 1
    assert min(outcomes.values()) > 20


def test_a_huge_image_is_refused_by_its_header(photo: Photo, encode: Encode) -> None:
    with pytest.raises(BadImageError, match="48 x 40 pixels, more than the limit of 1919"):
        decode(encode(photo(8), "JPEG"), max_pixels=1919)
    # Above Pillow's own limit and below ours, where Pillow would raise an error of its own.
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)), (b"IDAT", b""))
    wide = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    assert looks_the_same_to_all(wide)
    with pytest.raises(BadImageError, match="20000 x 10000 pixels"):
        decode(wide, max_pixels=2 * 10**8 - 1)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_fast_crops_are_within_two_levels_of_the_reference(photo: Photo, encode: Encode, kind: str) -> None:
    for seed, (width, height) in enumerate([(370, 375), (90, 61), (64, 64), (500, 80)]):
        data = encode(photo(seed, width, height), kind, quality=92)
        for size, scale in ((64, (0.9, 1.0)), (224, (0.08, 1.0))):
            fast, reference = (
                train_crop(decode(data, form=form), size, scale=scale, seed=seed) for form in ("fast", "reference")
            )
            assert fast.shape == reference.shape == (3, size, size)
            assert levels(fast, reference) <= 2


def test_the_reference_crop_is_open_clips_training_transform(photo: Photo) -> None:
    sizes = [(120, 90), (64, 64), (61, 133), (300, 20), (20, 300)]  # the last two are never met: the central crop
    for seed, (size, scale) in enumerate(itertools.product(sizes, [(0.9, 1.0), (0.08, 1.0), (1.0, 1.0)])):
        image = photo(9, *size)
        theirs = RandomResizedCrop(64, scale=scale, interpolation=InterpolationMode.BICUBIC)
        torch.manual_seed(seed)
        assert torch.equal(train_crop(image, 64, scale=scale, seed=seed), tensor(theirs(image)))


def test_a_crop_leaves_the_random_state_alone(photo: Photo) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = train_crop(photo(1), 32, scale=(0.5, 1.0), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, train_crop(photo(1), 32, scale=(0.5, 1.0), seed=2))


@pytest.mark.parametrize(
    ("mode", "size", "interpolation"),
    itertools.product(["shortest", "longest", "squash"], [32, (32, 48), 224], ["bicubic", "bilinear"]),
)
def test_the_evaluation_resize_is_open_clips(
    photo: Photo, mode: str, size: int | tuple[int, int], interpolation: str
) -> None:
    theirs: Any = image_transform(size, is_train=False, resize_mode=mode, interpolation=interpolation)
    cfg = {"size": size, "resize_mode": mode, "interpolation": interpolation}
    for width, height in ((80, 60), (61, 133), (30, 24), (37, 38)):
        image = photo(width, width, height)
        ours = eval_resize(image, cfg)
        assert torch.equal(normalize(ours[None], OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)[0], theirs(image))
        assert levels(eval_resize(tensor(image), cfg), ours) <= 2


def test_preprocessing_that_is_not_known_is_an_error(photo: Photo) -> None:
    with pytest.raises(ConfigError, match="resize_mode 'tallest'"):
        eval_resize(photo(1), {"size": 32, "resize_mode": "tallest"})
    with pytest.raises(ConfigError, match="interpolation 'nearest'"):
        eval_resize(photo(1), {"size": 32, "interpolation": "nearest"})


def test_a_file_without_a_telling_name_is_stored_by_its_content(tmp_path: Path, photo: Photo) -> None:
    photo(1).save(tmp_path / "a", "WEBP")
    photo(1).save(tmp_path / "b", "PPM")
    (tmp_path / "c").write_text("text")
    assert stored_extension("", (tmp_path / "a").read_bytes) == "webp"
    assert stored_extension(".JPEG", (tmp_path / "x").read_bytes) == "jpg"
    with pytest.raises(BadImageError, match="ppm images are not stored; convert it"):
        stored_extension("", (tmp_path / "b").read_bytes)
    with pytest.raises(BadImageError, match="not an image"):
        stored_extension("", (tmp_path / "c").read_bytes)


def test_a_line_instead_of_a_picture_is_refused_by_its_header(encode: Encode) -> None:
    """Its resize to a shorter side of 224 would take gigabytes."""
    for size in ((60_000, 1), (1, 60_000), (801, 2)):
        with pytest.raises(BadImageError, match=f"{size[0]} x {size[1]} pixels, a side more than 400 times"):
            decode(encode(Image.new("RGB", size), "PNG"))
    assert tensor(decode(encode(Image.new("RGB", (800, 2)), "PNG"))).shape == (3, 2, 800)


def test_a_long_image_keeps_a_pixel_on_its_short_side() -> None:
    """A long image keeps a pixel when its longer side is fitted."""
    cfg = {"size": 64, "resize_mode": "longest"}
    assert eval_resize(torch.zeros(3, 2, 800, dtype=torch.uint8), cfg).shape == (3, 64, 64)


def test_avif_is_read_in_both_forms(photo: Photo, encode: Encode) -> None:
    if not features.check("avif"):
        lacking("avif", "this Pillow cannot read AVIF")
    data = encode(photo(3), "AVIF")
    assert stored_extension("", lambda: data) == stored_extension(".AVIF", lambda: data) == "avif"
    assert torch.equal(tensor(decode(data)), tensor(decode(data, form="reference")))
    assert float((tensor(decode(data)).float() - tensor(photo(3)).float()).abs().mean()) < 8
