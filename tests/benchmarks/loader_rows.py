"""Rows 9 and 10: from JPEG to pixels. The loader against its peers, and three evaluation passes with kept pixels."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Line, Times, alternate, cpu_seconds_with_workers
from photos import made_photos, own_photos, photo_files
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomResizedCrop, ToTensor, v2
from webdataset.compat import WebDataset

from pipeline.data.eval.batches import eval_loader
from pipeline.data.eval.wds_layout import EvalSet, write_wds_eval
from pipeline.data.images import Preprocessing, normalize
from pipeline.data.shards.index import load_index, pack
from pipeline.data.sources.formats import read_source
from pipeline.data.storage.cache import Cache
from pipeline.data.train.stream import TrainDataset, train_loader

PHOTOS = 128
# Epochs in a row where workers decode: their start, which is the same for all, shall not decide.
EPOCHS = 4
BATCH = 32
SIZE, SCALE, HOW = 224, (0.9, 1.0), InterpolationMode.BICUBIC
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
CFG = {"size": SIZE, "interpolation": "bicubic", "resize_mode": "shortest"}
ENOUGH = 10**12
# open_clip's training transform.
TRANSFORM = Compose(
    [
        RandomResizedCrop(SIZE, SCALE, interpolation=HOW),
        lambda image: image.convert("RGB"),
        ToTensor(),
        Normalize(MEAN, STD),
    ]
)
Rows = dict[int, Callable[[int], list[Line]]]
Pass = Callable[[], object]


def rows(images: Path | None) -> Rows:
    """The rows on photographs made here and, where `images` names a folder or an archive, on the user's, too."""
    return {9: partial(_on_each, loader, images), 10: partial(_on_each, kept_pixels, images)}


def _on_each(row: Callable[[Subject, int], list[Line]], images: Path | None, rounds: int) -> list[Line]:
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        lines = row(Subject.of("100 kB", made_photos(place, PHOTOS), place / "made"), rounds)
        if images is not None:
            given = own_photos(images, place)
            lines += row(Subject.of(images.name.partition(".")[0], given, place / "given"), rounds)
    return lines


@dataclass(frozen=True)
class Subject:
    """Photographs as class folders, as shards and as an evaluation set; as many as fill batches."""

    name: str
    folder: Path
    shards: Path
    eval_set: EvalSet

    @staticmethod
    def of(name: str, photos: Path, scratch: Path) -> Subject:
        """Of the JPEGs of `photos` as many as PHOTOS, evenly spread over the classes."""
        files = photo_files(photos)
        number = min(PHOTOS, len(files)) // BATCH * BATCH
        for file in (files[i * len(files) // number] for i in range(number)):
            (scratch / "photos" / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, scratch / "photos" / file.parent.name)
        source = read_source(scratch / "photos")
        pack(scratch / "photos", scratch / "shards", samples_per_shard=BATCH)
        eval_set = write_wds_eval(source.samples, scratch / "eval", classnames=source.classes, templates=["{c}"])
        return Subject(name, scratch / "photos", scratch / "shards", eval_set)

    def own(self, workers: int = 0, *, epochs: int = 1, floats: bool = False) -> Pass:
        """The training loader, to the uint8 that goes to the device; `floats`: normalised on the CPU besides."""
        dataset = TrainDataset(load_index(self.shards), size=SIZE, seed=0, streams=BATCH, window=64, crop_scale=SCALE)
        stop = epochs * len(self.eval_set) // BATCH
        loader = train_loader(dataset, global_batch=BATCH, start_step=0, stop_step=stop, workers=workers)
        return lambda: [normalize(batch.images, MEAN, STD) if floats else batch.images for batch in loader]

    def webdataset(self, workers: int = 0, *, epochs: int = 1) -> Pass:
        shards = epochs * [str(file) for file in sorted(self.shards.glob("*.tar"))]
        samples: Any = WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil")
        return _images(DataLoader(samples.to_tuple("jpg", "cls").map_tuple(TRANSFORM, int), BATCH, num_workers=workers))

    def image_folder(self, workers: int = 0, *, epochs: int = 1) -> Pass:
        images = ConcatDataset(epochs * [ImageFolder(self.folder, TRANSFORM)])
        return _images(DataLoader(images, BATCH, num_workers=workers))

    def tight(self) -> Pass:
        """Stock decoder and stock crop over bytes in memory, stacked: no reading, no captions, no order."""
        data = [read_file(str(file)) for file in photo_files(self.folder)]
        crop = v2.RandomResizedCrop(SIZE, scale=SCALE, interpolation=HOW, antialias=True)

        def loop() -> list[Tensor]:
            made = [crop(decode_jpeg(each, mode=ImageReadMode.RGB)) for each in data]
            return [torch.stack(made[start : start + BATCH]) for start in range(0, len(made), BATCH)]

        return loop

    def evaluation(self, form: Preprocessing, cache: Cache | None, passes: int = 3) -> None:
        """As many passes over the images as an evaluation makes them, to normalised floats."""
        for _ in range(passes):
            for batch in eval_loader(self.eval_set, CFG, batch_size=BATCH, workers=0, preprocessing=form, pixels=cache):
                normalize(batch.images, MEAN, STD)


def _images(loader: Iterable[Any]) -> Pass:
    return lambda: [batch[0] for batch in loader]


def loader(subject: Subject, rounds: int) -> list[Line]:
    name = f"loader, {subject.name}"
    passes = {
        "own": subject.own(),
        "floats": subject.own(floats=True),
        "webdataset": subject.webdataset(),
        "folder": subject.image_folder(),
        "tight": subject.tight(),
    }
    times = alternate(passes, rounds)
    makers = {"own": subject.own, "webdataset": subject.webdataset, "folder": subject.image_folder}
    in_workers = {each: make(2, epochs=EPOCHS) for each, make in makers.items()}
    apart = alternate(in_workers, max(3, rounds // 3), cpu_seconds_with_workers)
    each = _each(subject, times)
    return [
        Line(9, name, "webdataset + PIL / selora", times.ratio("webdataset", "own"), 2.0, True, "2.5", each),
        Line(9, name, "tight loop / selora", times.ratio("tight", "own"), 0.85, True, "1.0"),
        Line(9, name, "ImageFolder + PIL / selora", times.ratio("folder", "own"), None, True, "2.5"),
        Line(9, name, "webdataset / selora normalised on CPU", times.ratio("webdataset", "floats"), None, True, "2.0"),
        Line(9, name, "webdataset / selora, 2 workers", apart.ratio("webdataset", "own"), None, True, "2.5"),
        Line(9, name, "ImageFolder / selora, 2 workers", apart.ratio("folder", "own"), None, True, "2.5"),
    ]


def kept_pixels(subject: Subject, rounds: int) -> list[Line]:
    """A cache that is new in every round, but for the later pass, which finds all it wants."""
    name = f"eval cache, {subject.name}"

    with tempfile.TemporaryDirectory() as folder:

        def anew(form: Preprocessing) -> None:
            subject.evaluation(form, Cache(Path(tempfile.mkdtemp(dir=folder)), ENOUGH))

        filled = Cache(Path(folder) / "filled", ENOUGH)
        subject.evaluation("reference", filled, passes=1)
        passes = {
            "3 from JPEG": lambda: subject.evaluation("reference", None),
            "3 kept": lambda: anew("reference"),
            "3 fast and kept": lambda: anew("fast"),
            "1 from JPEG": lambda: subject.evaluation("reference", None, passes=1),
            "1 later": lambda: subject.evaluation("reference", filled, passes=1),
        }
        times = alternate(passes, rounds)
    three = times.ratio("3 from JPEG", "3 kept")
    fast = times.ratio("3 from JPEG", "3 fast and kept")
    return [
        Line(10, name, "3 passes, from JPEG (PIL) / kept", three, 2.5, True, "3.0", _each(subject, times)),
        Line(10, name, "3 passes, from JPEG (PIL) / fast and kept", fast, None, True, ""),
        Line(10, name, "a later pass, from JPEG (PIL) / kept", times.ratio("1 from JPEG", "1 later"), 5.0, True, ""),
    ]


def _each(subject: Subject, times: Times) -> str:
    """CPU milliseconds of an image."""
    return ", ".join(f"{each} {1e3 * times.median(each) / len(subject.eval_set):.2f} ms" for each in times.seconds)
