"""Shards to training batches, in the order that order.py fixes. The stream's position is one number: the step."""

from __future__ import annotations

import signal
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.config import ConfigError
from pipeline.data.images import STORED_EXTENSIONS, BadImage, Preprocessing, decode, train_crop
from pipeline.data.order import Order, check_split, draw_without_repetition, rank_positions, stable_hash
from pipeline.data.shards import ShardIndex
from pipeline.data.tar import TarError, TarIndex, TarSample
from pipeline.prompts import caption, resolve_templates

OPEN_TARS = 256
SUBSTITUTES = 64


@dataclass(frozen=True)
class TrainSample:
    """One decoded sample. ``bad`` says why another one stands here; '' when none does."""

    position: int
    image: Tensor
    caption: str
    key: str
    label: int
    bad: str


@dataclass(frozen=True)
class Batch:
    """What this rank trains on in ``step``: images uint8 (B, 3, H, W), labels int64 (B,) (-1 without a class),
    ``bad`` "shard/key: reason" of the samples that others stand in for."""

    step: int
    images: Tensor
    captions: list[str]
    keys: list[str]
    labels: Tensor
    bad: list[str]

    def pin_memory(self) -> Batch:
        """Called by the DataLoader when it pins."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class TrainDataset(Dataset[TrainSample]):
    """Training samples by global position; a function of its arguments alone, in every process."""

    def __init__(
        self,
        index: ShardIndex,
        *,
        size: int | tuple[int, int],
        seed: int,
        streams: int,
        window: int,
        templates: str | Sequence[str] = "openai",
        crop_scale: tuple[float, float] = (0.9, 1.0),
        preprocessing: Preprocessing = "fast",
        max_pixels: int = 2**28,
    ) -> None:
        self.index, self.size, self.seed = index, size, seed
        self.order = Order(index.sizes(), seed=seed, streams=streams, window=window)
        self.templates = resolve_templates(templates)
        self.crop_scale, self.preprocessing, self.max_pixels = crop_scale, preprocessing, max_pixels
        self._tars: OrderedDict[int, TarIndex] = OrderedDict()

    def __getitem__(self, position: int) -> TrainSample:
        """The sample at ``position``, or the next good one of its stream; TarError when the shard itself is broken."""
        epoch = self.order.locate(position).epoch
        first_fault = ""
        for tried in range(SUBSTITUTES):
            place = self.order.locate(position + tried * self.order.streams)
            tar = self._tar(place.shard)
            entry = tar.samples[place.sample]
            key = f"{self.index.shards[place.shard].name}/{entry.key}"
            try:
                return self._load(position, epoch, tar, place.sample, key, first_fault)
            except BadImage as error:
                first_fault = first_fault or f"{key}: {error}"
        raise TarError(f"{SUBSTITUTES} samples in a row are bad, first {first_fault}; `selora verify` lists them all")

    def _load(self, position: int, epoch: int, tar: TarIndex, sample: int, key: str, bad: str) -> TrainSample:
        members = tar.samples[sample].members
        label, texts = self._texts(tar, sample)
        ext = next((ext for ext in STORED_EXTENSIONS if ext in members), None)
        if ext is None:
            raise BadImage(f"no image among its members ({', '.join(members)})")
        image = decode(tar.read(sample, ext), form=self.preprocessing, max_pixels=self.max_pixels)
        crop_seed = stable_hash("crop", self.seed, epoch, key)
        pixels = train_crop(image, self.size, scale=self.crop_scale, seed=crop_seed)
        text = texts[draw_without_repetition(len(texts), self.seed, key, epoch)]
        return TrainSample(position, pixels, text, key, label, bad)

    def _texts(self, tar: TarIndex, sample: int) -> tuple[int, list[str]]:
        """The label (-1 without) and the captions to draw from: its own, else the templates about its class."""
        entry: TarSample = tar.samples[sample]
        label = -1
        if "cls" in entry.members:
            raw = tar.read(sample, "cls").strip()
            if not raw.isdigit() or (self.index.classes is not None and int(raw) >= len(self.index.classes)):
                raise BadImage(f"its class {raw[:20]!r} is not in the index")
            label = int(raw)
        if "txt" in entry.members:
            lines = tar.read(sample, "txt").decode("utf-8", "replace").splitlines()
            own = [line.replace("\\n", "\n") for line in lines if line.strip()]
            if own:
                return label, own
        if label < 0 or self.index.classes is None:
            raise BadImage(f"neither a caption nor a class among its members ({', '.join(entry.members)})")
        return label, [caption(template, self.index.classes[label]) for template in self.templates]

    def _tar(self, shard: int) -> TarIndex:
        known = self._tars.get(shard)
        if known is None:
            recorded = self.index.shards[shard]
            known = TarIndex(self.index.directory / recorded.name)
            if len(known) != recorded.samples:
                raise TarError(f"{known.path}: {len(known)} samples, its index says {recorded.samples}; pack it again")
            self._tars[shard] = known
            if len(self._tars) > OPEN_TARS:
                self._tars.popitem(last=False)[1].close()
        else:
            self._tars.move_to_end(shard)
        return known


@dataclass(frozen=True)
class RankSteps:
    """The batch sampler: for each step in [start, stop) the positions of one rank."""

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


def collate(global_batch: int) -> Callable[[list[TrainSample]], Batch]:
    """Samples of one rank and step into a Batch."""
    return _Collate(global_batch)


@dataclass(frozen=True)
class _Collate:
    global_batch: int

    def __call__(self, samples: list[TrainSample]) -> Batch:
        return Batch(
            step=samples[0].position // self.global_batch,
            images=torch.stack([sample.image for sample in samples]),
            captions=[sample.caption for sample in samples],
            keys=[sample.key for sample in samples],
            labels=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
            bad=[sample.bad for sample in samples if sample.bad],
        )


def steps_per_epoch(samples: int, global_batch: int) -> float:
    """Epochs follow each other without a gap, so this need not be whole."""
    return samples / global_batch


def train_loader(
    dataset: TrainDataset,
    *,
    global_batch: int,
    start_step: int,
    stop_step: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    prefetch: int = 4,
    pin: bool = False,
    start_method: str | None = None,
) -> DataLoader[Batch]:
    """Batches of this rank for steps [start_step, stop_step), in order, whatever the number of workers.

    Iterate it once. Raises ConfigError when streams, batch and ranks do not fit each other.
    """
    streams = dataset.order.streams
    check_split(global_batch, streams, world)
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} is not in a world of {world}")
    return DataLoader(
        dataset,
        batch_sampler=RankSteps(start_step, stop_step, global_batch, streams, rank, world),  # type: ignore[arg-type]
        collate_fn=collate(global_batch),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin,
        worker_init_fn=_calm_worker,
        multiprocessing_context=start_method if workers else None,
        # Its own generator: the DataLoader draws a seed, which would shift the trainer's random state between resumes.
        generator=torch.Generator().manual_seed(0),
    )


def _calm_worker(worker: int) -> None:
    """A launcher signals the whole process group; workers must outlive it until the trainer has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # SIGTERM cannot be ignored for good, for the parent ends stuck workers by it: a minute is the trainer's time to save.
    signal.signal(signal.SIGTERM, _leave_in_a_minute)


def _leave_in_a_minute(number: int, frame: object) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(60)
