"""Evaluation sets as batches of pixels.

Counts are exact: each sample goes to one rank, batches are not padded, and an unreadable sample is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.batches import Batches
from pipeline.data.eval.decoded_cache import KeptPixels, open_pixels, trouble_with
from pipeline.data.eval.wds_layout import EvalSet
from pipeline.data.images import (
    MAX_PIXELS,
    STORED_EXTENSIONS,
    BadImageError,
    Preprocessing,
    Resize,
    decode,
    eval_resize,
    size_pair,
    with_resize,
    without_border,
)
from pipeline.data.storage.cache import Cache


@dataclass(frozen=True)
class EvalBatch:
    """One batch of an evaluation set.

    images: uint8 (B, 3, H, W). labels: int64 (B,), empty for retrieval. captions: a tuple per image, empty for
    classification. indices: int64 (B,), the numbers of the samples in the set. trouble: why pixels are not cached.
    """

    images: Tensor
    labels: Tensor
    captions: list[tuple[str, ...]]
    indices: Tensor
    trouble: str = ""

    def pin_memory(self) -> EvalBatch:
        """Called by torch's DataLoader when it pins."""
        return replace(self, images=self.images.pin_memory())


def eval_loader(
    eval_set: EvalSet,
    cfg: Mapping[str, Any],
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    preprocessing: Preprocessing = "reference",
    limit: int | None = None,
    only: Sequence[int] | None = None,
    border: int = 0,
    resize: Resize | None = None,
    max_pixels: int = MAX_PIXELS,
    pin: bool = False,
    pixels: Cache | None = None,
) -> Batches[EvalBatch]:
    """This rank's contiguous part of the set; concatenated, the ranks' parts are the set in its order.

    ``cfg`` is open_clip's preprocessing (see images.eval_resize); "reference" is its ``image_transform`` up to the
    normalisation. ``only`` names the samples to take, ``limit`` takes that many of them, evenly spread. ``border``
    pixels are cropped from each side before the resize, which ``resize`` replaces (see images.with_resize). ``pixels``
    keeps decoded images for the next time; the batches are the same without it. Raises ConfigError for an unreadable
    image.
    """
    pool = range(len(eval_set)) if only is None else only
    total = len(pool) if limit is None else min(limit, len(pool))
    everywhere = [pool[i * len(pool) // total] for i in range(total)]
    chosen = everywhere[rank * total // world : (rank + 1) * total // world]
    plan = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    make = _MakeEvalBatch(eval_set, with_resize(cfg, resize), preprocessing, max_pixels, border).keeping(
        pixels, everywhere
    )
    if make.kept is not None and not pin and not make.kept.missing(chosen):
        workers = 0  # reading is cheaper than passing tensors between processes; for a GPU workers still read ahead
    return Batches(make, plan, workers=workers, pin=pin)


@dataclass(frozen=True)
class _MakeEvalBatch:
    eval_set: EvalSet
    cfg: dict[str, Any]
    preprocessing: Preprocessing
    max_pixels: int
    border: int
    kept: KeptPixels | None = None
    trouble: str = ""

    def keeping(self, cache: Cache | None, wanted: Sequence[int]) -> _MakeEvalBatch:
        """The same loader with the cache's entry for these pixels, or with the reason why there is none."""
        if cache is None:
            return self
        deciding = {name: self.cfg.get(name) for name in ("interpolation", "resize_mode", "fill_color", "shorter_side")}
        key = self.eval_set.digest, self.preprocessing, self.border, deciding
        try:
            found = open_pixels(cache, self.eval_set.name, key, size_pair(self.cfg["size"]), wanted)
        except OSError as error:
            return replace(self, trouble=trouble_with(cache.directory, error))
        return replace(self, kept=found)

    def __call__(self, indices: Sequence[int]) -> EvalBatch:
        chosen = self.eval_set
        if self.kept is None:
            images, trouble = torch.stack([self._image(i) for i in indices]), self.trouble
        else:
            images, trouble = self.kept.read_through(indices, self._image)
        return EvalBatch(
            images=images,
            trouble=trouble,
            labels=torch.tensor([chosen.labels[i] for i in indices] if chosen.labels else [], dtype=torch.int64),
            captions=[chosen.captions[i] for i in indices] if chosen.captions else [],
            indices=torch.tensor(indices, dtype=torch.int64),
        )

    def _image(self, i: int) -> Tensor:
        try:
            pixels = decode(self._stored(i), form=self.preprocessing, max_pixels=self.max_pixels, as_stored=True)
            return eval_resize(without_border(pixels, self.border), self.cfg)
        except BadImageError as error:
            raise ConfigError(f"{self._name(i)}: {error}") from error

    def _stored(self, i: int) -> bytes:
        tar, number = self.eval_set.places[i]
        index = self.eval_set.tars[tar]
        ext = next((ext for ext in STORED_EXTENSIONS if ext in index.samples[number].members), None)
        if ext is None:
            raise ConfigError(f"{self._name(i)}: no image among its members ({index.samples[number]})")
        return index.read(number, ext)

    def _name(self, i: int) -> str:
        tar, number = self.eval_set.places[i]
        return f"{self.eval_set.tars[tar].name}: {self.eval_set.tars[tar].samples[number].key}"
