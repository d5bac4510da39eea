"""From shards to training batches, in the order of order.py. The position of the stream is one number, the step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.batches import Batches, taking_turns
from pipeline.data.images import MAX_PIXELS, STORED_EXTENSIONS, BadImageError, Preprocessing, decode, train_crop
from pipeline.data.order import Order, check_split, draw_without_repetition, rank_positions, stable_hash
from pipeline.data.reference.samples import ReferenceBatch, ReferenceData
from pipeline.data.shards.index import ShardIndex, open_shard
from pipeline.data.shards.members import sample_texts
from pipeline.data.storage.remote import retries
from pipeline.data.storage.tar import TarIndex, TarSample
from pipeline.data.train.prefetch import ReadAhead, Turns, read_ahead
from pipeline.prompts import caption, resolve_templates

OPEN_TARS = 256
# Captions to tokens (B, L), int64, in the process that makes the batch.
Tokenizer = Callable[[list[str]], Tensor]
# Captions and their tokens to the numbers of the captions that are cut off.
FindCut = Callable[[list[str], Tensor], list[int]]
# If the next 64 samples of a stream are all bad, more than single images is at fault.
SUBSTITUTES = 64


@dataclass(frozen=True)
class TrainSample:
    """One decoded sample: uint8 (3, H, W). ``bad``: the sample that it replaces and why; '' for none."""

    image: Tensor
    caption: str
    key: str
    label: int
    bad: str = ""


@dataclass(frozen=True)
class Batch:
    """The batch of this rank in ``step``.

    images: uint8 (B, 3, H, W). labels: int64 (B,), -1 without a class. keys: "shard/key" of the actual samples. bad:
    "shard/key: reason" of each sample that another one replaces. tokens: int64 (B, L) of the captions, None without a
    tokenizer. retries: repeated requests to a store since the last batch of the same process. cut: "shard/key" of each
    sample whose caption has more tokens than the model reads.
    """

    step: int
    images: Tensor
    captions: list[str]
    keys: list[str]
    labels: Tensor
    bad: list[str]
    tokens: Tensor | None = None
    retries: int = 0
    reference: ReferenceBatch | None = None
    cut: Sequence[str] = ()

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader when it pins."""
        return self.each_tensor(Tensor.pin_memory)

    def each_tensor(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with its images, labels, tokens and reference samples changed."""
        tokens = None if self.tokens is None else change(self.tokens)
        reference = None if self.reference is None else self.reference.each_tensor(change)
        return replace(self, images=change(self.images), labels=change(self.labels), tokens=tokens, reference=reference)


class TrainDataset:
    """Training samples by global position: a function of the arguments only, the same in every process."""

    def __init__(
        self,
        index: ShardIndex,
        *,
        size: int | Sequence[int],
        seed: int,
        streams: int,
        window: int,
        templates: str | Sequence[str] = "openai",
        crop_scale: tuple[float, float] = (0.9, 1.0),
        flip: bool = False,
        preprocessing: Preprocessing = "fast",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.index, self.size, self.seed = index, size, seed
        self.order = Order(index.sizes(), seed=seed, streams=streams, window=window)
        self.templates = resolve_templates(templates)
        self.preprocessing: Preprocessing = preprocessing
        self.crop_scale, self.flip, self.max_pixels = crop_scale, flip, max_pixels
        self._tars: OrderedDict[int, TarIndex] = OrderedDict()

    @property
    def opened(self) -> Container[int]:
        """The open shards of this process."""
        return self._tars

    def __getitem__(self, position: int) -> TrainSample:
        """The sample at ``position``; if it is bad, the next good one of its stream, cropped for this epoch.

        Raises TarError for a damaged shard, and ConfigError if too many samples in a row are bad.
        """
        first = place = self.order.locate(position)
        fault = ""
        for further in range(1, SUBSTITUTES + 1):
            tar = self._tar(place.shard)
            key = f"{self.index.shards[place.shard].name}/{tar.samples[place.sample].key}"
            try:
                return replace(self._load(tar, place.sample, key, first.epoch), bad=fault)
            except BadImageError as error:
                fault = fault or f"{key}: {error}"
            place = self.order.locate(position + further * self.order.streams)
        raise ConfigError(
            f"{self.index.folder.location}: {SUBSTITUTES} samples in a row are bad, first {fault}; "
            "`selora verify` lists all"
        )

    def _load(self, tar: TarIndex, number: int, key: str, epoch: int) -> TrainSample:
        members = tar.samples[number].members
        ext = next((ext for ext in STORED_EXTENSIONS if ext in members), None)
        if ext is None:
            raise BadImageError(f"no image among its members ({tar.samples[number]})")
        label, texts = sample_texts(tar, number, self.index.classes)
        name = None if texts else self._classname(label, tar.samples[number])
        choices = texts or self.templates
        image = decode(tar.read(number, ext), form=self.preprocessing, max_pixels=self.max_pixels)
        pixels = train_crop(image, self.size, scale=self.crop_scale, seed=stable_hash("crop", self.seed, epoch, key))
        if self.flip and stable_hash("flip", self.seed, epoch, key) % 2:
            pixels = pixels.flip(-1)
        text = choices[draw_without_repetition(len(choices), self.seed, key, epoch)]
        return TrainSample(
            image=pixels,
            caption=text if name is None else caption(text, name),
            key=key,
            label=label,
        )

    def _classname(self, label: int, sample: TarSample) -> str:
        if label < 0 or self.index.classes is None:
            raise BadImageError(f"neither caption nor class among its members ({sample})")
        return self.index.classes[label]

    def _tar(self, shard: int) -> TarIndex:
        known = self._tars.get(shard)
        if known is None:
            known = self._tars[shard] = open_shard(self.index, shard)
            if len(self._tars) > OPEN_TARS:
                self._tars.popitem(last=False)[1].close()
        self._tars.move_to_end(shard)
        return known


@dataclass(frozen=True)
class RankSteps:
    """The positions of one rank for each step in [start, stop)."""

    start: int
    stop: int
    global_batch: int
    streams: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            yield rank_positions(step, self.global_batch, self.streams, self.rank, self.world)

    def __len__(self) -> int:
        return max(0, self.stop - self.start)


class _MakeBatch:
    """Makes a Batch from the positions of one rank and step; see `train_loader` for the options."""

    _reading: Sequence[ReadAhead] = ()  # also of one that a dying trainer did not send to its worker whole

    def __init__(
        self,
        dataset: TrainDataset,
        plan: RankSteps,
        tokenizer: Tokenizer | None,
        reference: ReferenceData | None,
        *,
        find_cut: FindCut | None,
        ahead: int,
        sharing: int,
    ) -> None:
        self.dataset, self.plan, self.tokenizer, self.reference = dataset, plan, tokenizer, reference
        self._find_cut = find_cut
        self._ahead, self._sharing = ahead, sharing
        self._reading = []
        self._next, self._retries = -1, 0

    def __call__(self, positions: Sequence[int]) -> Batch:
        step, every = positions[0] // self.plan.global_batch, taking_turns()
        # A step that does not follow this process's last one begins an iteration.
        begins, self._next = step != self._next, step + every
        if begins:
            self._stop_reading()
            self._retries = retries()
        for reading in self._reading:
            reading.reached(step)
        samples = [self.dataset[position] for position in positions]
        plan, reference = self.plan, None
        if self.reference is not None:
            reference = self.reference.batch(step, plan.rank, plan.world)
        if begins:
            # Not before, because the first batch should not share the bandwidth with later ones.
            self._reading = self._read_ahead(step, every)
        before, self._retries = self._retries, retries()
        captions = [sample.caption for sample in samples]
        tokens = None if self.tokenizer is None else self.tokenizer(captions)
        cut = [] if tokens is None or self._find_cut is None else self._find_cut(captions, tokens)
        return Batch(
            step=step,
            images=torch.stack([sample.image for sample in samples]),
            captions=captions,
            tokens=tokens,
            keys=[sample.key for sample in samples],
            labels=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
            bad=[sample.bad for sample in samples if sample.bad] + ([] if reference is None else reference.bad),
            retries=self._retries - before,
            reference=reference,
            cut=[samples[number].key for number in cut],
        )

    def __del__(self) -> None:
        self._stop_reading()

    def _stop_reading(self) -> None:
        for reading in self._reading:
            reading.close()
        self._reading = []

    def _read_ahead(self, step: int, every: int) -> list[ReadAhead]:
        plan, data = self.plan, self.dataset
        sources = [(data.index, data.order, plan.global_batch, data.opened)]
        if self.reference is not None and (images := self.reference.images) is not None:
            sources.append((images.index, images.order, self.reference.global_batch, images.opened))
        found = [
            read_ahead(
                index,
                order,
                Turns(step, plan.stop, every, batch, plan.rank, plan.world),
                self._ahead,
                self._sharing * len(sources),
                opened,
            )
            for index, order, batch, opened in sources
        ]
        return [reading for reading in found if reading is not None]


def train_loader(
    dataset: TrainDataset,
    *,
    global_batch: int,
    start_step: int,
    stop_step: int,
    tokenizer: Tokenizer | None = None,
    find_cut: FindCut | None = None,
    reference: ReferenceData | None = None,
    rank: int = 0,
    world: int = 1,
    sharing: int = 1,
    workers: int = 2,
    prefetch: int = 4,
    ahead: int = 2,
    pin: bool = False,
    start_method: str | None = None,
) -> Batches[Batch]:
    """Batches of this rank for the steps [start_step, stop_step), in order, the same with any number of workers.

    ``tokenizer``: makes the tokens of a batch, in the worker that makes the batch. ``find_cut``: finds captions
    with more tokens than the model reads. ``reference``: source of the reference samples of each batch. ``ahead``:
    number of remote shards to prefetch per stream of the rank. ``sharing``: number of ranks on this machine, which
    share its cache. Raises ConfigError if streams, batch and ranks do not match, and during iteration for a damaged
    shard.
    """
    streams = dataset.order.streams
    check_split(global_batch, streams, world)
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} is not in a world of {world}")
    plan = RankSteps(start_step, stop_step, global_batch, streams, rank, world)
    make = _MakeBatch(dataset, plan, tokenizer, reference, find_cut=find_cut, ahead=ahead, sharing=sharing)
    return Batches(make, plan, workers=workers, prefetch=prefetch, pin=pin, start_method=start_method)
