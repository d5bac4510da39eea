"""Reference samples of a training step, determined only by seed and step, like training samples.

About a tenth of them is held out, by a hash of the key: it is never trained on and measures how far the model has
    moved.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.images import BadImageError
from pipeline.data.order import Order, draw_without_repetition, rank_positions, stable_hash
from pipeline.data.reference.features import Reading, stored_image
from pipeline.data.shards.index import ShardIndex, open_shard
from pipeline.data.storage.tar import TarIndex

HELD_OUT_SHARE, HELD_OUT_LEAST, HELD_OUT_MOST = 0.1, 16, 128
_OPEN_TARS = 64
_SUBSTITUTES = 64


class Reference(NamedTuple):
    """Reference images and texts with their features from the untouched model.

    images: uint8 (R, 3, H, W). image_features: (R, D). tokens: int64 (T, context); captions of the images first, if
    they have any, then other texts. text_features: (T, D). R or T may be 0.
    """

    images: Tensor
    image_features: Tensor
    tokens: Tensor
    text_features: Tensor


@dataclass(frozen=True)
class ReferenceBatch:
    """This rank's reference samples in a step. bad: "shard/key: reason" of each image that another one replaces."""

    tensors: Reference
    bad: list[str]

    def each_tensor(self, change: Callable[[Tensor], Tensor]) -> ReferenceBatch:
        """The batch with its tensors changed."""
        return ReferenceBatch(Reference(*map(change, self.tensors)), self.bad)


def held_out(keys: Sequence[int] | np.ndarray) -> np.ndarray:
    """(N,) bool: the tenth of the samples with the smallest hashes, 16 to 128 of them and at most half."""
    count = len(keys)
    wanted = min(HELD_OUT_MOST, max(HELD_OUT_LEAST, math.ceil(HELD_OUT_SHARE * count)), count // 2)
    chosen = np.zeros(count, dtype=bool)
    chosen[np.argsort(np.asarray(keys, dtype=np.int64), kind="stable")[:wanted]] = True
    return chosen


class Texts:
    """Reference texts as tokens, in their own order."""

    def __init__(self, texts: Sequence[str], found: dict[str, Tensor], *, seed: int, streams: int) -> None:
        out = held_out([stable_hash("keep", text) for text in texts])
        self._tokens, self._features = found["tokens"], found["features"]
        self._trained, self._held = np.nonzero(~out)[0], np.nonzero(out)[0]
        size = len(self._trained)
        self._order = Order([size], seed=stable_hash("keep texts", seed), streams=streams, window=size)

    def at(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens (N, context) and features (N, D) at these positions."""
        return self._rows([int(self._trained[self._order.locate(position).sample]) for position in positions])

    def held(self) -> tuple[Tensor, Tensor]:
        """Tokens and features of the held-out texts."""
        return self._rows(self._held.tolist())

    def _rows(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self._tokens[rows].long(), self._features[rows]


class _Sample(NamedTuple):
    """A reference image with the numbers of its shard, and of its sample and caption in the shard."""

    shard: int
    number: int
    pixels: Tensor
    caption: int


class Images:
    """Reference images from shards, in their own order, with a caption each if all have one."""

    def __init__(
        self,
        index: ShardIndex,
        found: Sequence[dict[str, Tensor]],
        reading: Reading,
        *,
        seed: int,
        streams: int,
        window: int,
    ) -> None:
        self.index, self._found, self._reading, self._seed = index, found, reading, seed
        out = held_out(np.concatenate([shard["key"].numpy() for shard in found]))
        by_shard = np.split(out, np.cumsum(index.sizes())[:-1])
        self._trained = [np.nonzero(~each)[0] for each in by_shard]
        self._held = [
            (shard, int(number))
            for shard, each in enumerate(by_shard)
            for number in np.nonzero(each)[0]
            if found[shard]["good"][number]
        ]
        self.order = Order(
            [len(each) for each in self._trained], seed=stable_hash("keep", seed), streams=streams, window=window
        )
        missing = sum(int(((shard["captions"].diff() == 0) & shard["good"]).sum()) for shard in found)
        # Each image needs one, because all ranks must have equally many texts; a ViT reads none of them.
        self.captioned, self.uncaptioned = missing == 0 and any(len(shard["tokens"]) for shard in found), missing
        self._tars: OrderedDict[int, TarIndex] = OrderedDict()

    @property
    def opened(self) -> OrderedDict[int, TarIndex]:
        """The open shards of this process."""
        return self._tars

    def at(self, positions: Sequence[int]) -> tuple[Reference, list[str]]:
        """Samples at these positions; a bad one is replaced by the next good one of its stream and named."""
        found = [self._good(position) for position in positions]
        return self._stacked([sample for sample, _ in found]), [fault for _, fault in found if fault]

    def held(self) -> Reference:
        """The held-out samples, each with its first caption."""
        return self._stacked([self._sample(shard, number) for shard, number in self._held])

    def _good(self, position: int) -> tuple[_Sample, str]:
        epoch, fault = self.order.locate(position).epoch, ""
        for further in range(_SUBSTITUTES):
            place = self.order.locate(position + further * self.order.streams)
            number = int(self._trained[place.shard][place.sample])
            key = f"{self.index.shards[place.shard].name}/{self._tar(place.shard).samples[number].key}"
            try:
                return self._sample(place.shard, number, key, epoch), fault
            except BadImageError as error:
                fault = fault or f"{key}: {error}"
        raise ConfigError(
            f"keep.images={self.index.folder.location}: {_SUBSTITUTES} samples in a row are bad, first {fault}; "
            "`selora verify` lists all"
        )

    def _sample(self, shard: int, number: int, key: str = "", epoch: int = 0) -> _Sample:
        """The sample with its caption of `epoch`; each caption occurs once in as many epochs as there are captions."""
        pixels = self._reading.pixels(stored_image(self._tar(shard), number))
        first, end = self._found[shard]["captions"][number : number + 2].tolist()
        drawn = draw_without_repetition(end - first, self._seed, key, epoch) if key and end > first else 0
        return _Sample(shard, number, pixels, first + drawn)

    def _stacked(self, samples: list[_Sample]) -> Reference:
        def rows(name: str, of: Callable[[_Sample], int]) -> Tensor:
            return torch.stack([self._found[each.shard][name][of(each)] for each in samples])

        images, features = torch.stack([each.pixels for each in samples]), rows("image", lambda each: each.number)
        if not self.captioned:
            return Reference(images, features, torch.zeros(0, 0, dtype=torch.int64), features[:0])
        return Reference(
            images, features, rows("tokens", lambda each: each.caption).long(), rows("caption", lambda e: e.caption)
        )

    def _tar(self, shard: int) -> TarIndex:
        known = self._tars.get(shard)
        if known is None:
            known = self._tars[shard] = open_shard(self.index, shard)
            if len(self._tars) > _OPEN_TARS:
                self._tars.popitem(last=False)[1].close()
        self._tars.move_to_end(shard)
        return known


@dataclass(frozen=True)
class ReferenceData:
    """Reference images, texts or both, distributed over ranks like training samples.

    Attributes:
        global_batch: reference images, and as many texts of the list, per step over all ranks.
        streams: parts of an epoch of reference samples.
        size: (H, W) of images.
        cut: tokens (T, context) -> (T, length), without padding that the model need not read.
    """

    images: Images | None
    texts: Texts | None
    global_batch: int
    streams: int
    size: tuple[int, int]
    cut: Callable[[Tensor], Tensor]

    def batch(self, step: int, rank: int, world: int) -> ReferenceBatch:
        """This rank's reference samples of a step: an equal share, in rank order."""
        positions = rank_positions(step, self.global_batch, self.streams, rank, world)
        images, bad = (None, []) if self.images is None else self.images.at(positions)
        texts = None if self.texts is None else self.texts.at(positions)
        return ReferenceBatch(self._joined(images, texts), bad)

    def held(self) -> Reference:
        """The held-out samples, the same on every rank."""
        images = None if self.images is None else self.images.held()
        return self._joined(images, None if self.texts is None else self.texts.held())

    def _joined(self, images: Reference | None, texts: tuple[Tensor, Tensor] | None) -> Reference:
        if texts is None:
            assert images is not None, "there are images or texts"
            return images._replace(tokens=self.cut(images.tokens)) if len(images.tokens) else images
        tokens, features = texts
        if images is None:
            pixels = torch.zeros(0, 3, *self.size, dtype=torch.uint8)
            return Reference(pixels, features[:0], self.cut(tokens), features)
        if len(images.tokens):
            tokens, features = torch.cat([images.tokens, tokens]), torch.cat([images.text_features, features])
        return Reference(images.images, images.image_features, self.cut(tokens), features)


def reference_streams(global_batch: int, streams: int, world: int) -> int:
    """The number of streams of reference samples, which does not depend on the number of ranks.

    Raises:
        ConfigError: the ranks cannot share the batch.
    """
    if global_batch % world:
        near = max(1, round(global_batch / world)) * world
        raise ConfigError(
            f"keep.batch_size: {global_batch} reference samples cannot be shared by {world} ranks; {near} would be"
        )
    return math.gcd(global_batch, streams)
