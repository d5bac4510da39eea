"""Training batches: the same on any number of ranks and workers, from any step, even with bad images."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline.config import ConfigError
from pipeline.config.templates import TEMPLATES
from pipeline.data.shards.index import ShardIndex
from pipeline.data.storage.tar import TarError
from pipeline.data.train.stream import Batch, TrainDataset, train_loader
from pipeline.prompts import caption

Photo = Callable[..., Image.Image]
Encode = Callable[..., bytes]
ShardsOf = Callable[..., ShardIndex]


def dataset(index: ShardIndex, **changes: Any) -> TrainDataset:
    options: dict[str, Any] = {"size": 16, "seed": 0, "streams": 8, "window": 5, "templates": "openai"}
    return TrainDataset(index, **(options | changes))


def batches(index: ShardIndex, start: int, stop: int, **options: Any) -> list[Batch]:
    changes = options.pop("dataset", {})
    options = {"global_batch": 8, "workers": 0} | options
    return list(train_loader(dataset(index, **changes), start_step=start, stop_step=stop, **options))


def same(a: Batch, b: Batch) -> bool:
    return (
        (a.step, a.captions, a.keys, a.bad) == (b.step, b.captions, b.keys, b.bad)
        and torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
    )


def rows(parts: Sequence[Batch]) -> list[tuple[Any, ...]]:
    """The samples of one step with all that belongs to them, in an order that does not depend on ranks."""
    found = []
    for batch in parts:
        found += zip(
            batch.keys,
            batch.captions,
            batch.labels.tolist(),
            [image.numpy().tobytes() for image in batch.images],
            strict=True,
        )
    return sorted(found)


def test_a_batch_is_what_the_trainer_asks_for(shards: ShardIndex) -> None:
    batch = batches(shards, 3, 4)[0]
    assert batch.step == 3
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (8, 3, 16, 16))
    assert shards.classes is not None
    for key, text, label in zip(batch.keys, batch.captions, batch.labels.tolist(), strict=True):
        assert key.partition("/")[2].partition("/")[0].replace("_", " ") == shards.classes[label]
        assert text in {caption(template, shards.classes[label]) for template in TEMPLATES["openai"]}
    assert batch.bad == []


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (4, 0), (8, 0), (2, 2)])
def test_global_batches_do_not_depend_on_ranks_and_workers(shards: ShardIndex, world: int, workers: int) -> None:
    one = batches(shards, 0, 9)
    per_rank = [batches(shards, 0, 9, rank=rank, world=world, workers=workers) for rank in range(world)]
    assert [len(part) for part in per_rank] == [9] * world
    for step in range(9):
        assert [batch.step for batch in (part[step] for part in per_rank)] == [step] * world
        assert rows([part[step] for part in per_rank]) == rows([one[step]])


def test_resumes_on_other_ranks_and_workers_are_exact(shards: ShardIndex) -> None:
    """A resume continues exactly and so does a second one on other ranks and workers."""
    whole = batches(shards, 0, 20)
    for start, stop, workers in ((4, 20, 0), (4, 11, 2), (11, 20, 1), (19, 20, 0), (20, 20, 2)):
        resumed = batches(shards, start, stop, workers=workers)
        assert len(resumed) == stop - start
        assert all(same(a, b) for a, b in zip(resumed, whole[start:stop], strict=True))
    for world in (2, 4):
        per_rank = [batches(shards, 7, 12, rank=rank, world=world) for rank in range(world)]
        for step in range(5):
            assert rows([part[step] for part in per_rank]) == rows([whole[7 + step]])


def test_every_epoch_has_each_sample_once(shards: ShardIndex) -> None:
    """Every epoch has each sample once though batches straddle its end."""
    keys = [key for batch in batches(shards, 0, 20) for key in batch.keys]
    for epoch in range(3):
        part = keys[epoch * 53 : (epoch + 1) * 53]
        assert len(set(part)) == len(part) == min(53, 160 - epoch * 53)


def test_templates_rotate_over_epochs_and_crops_change(shards: ShardIndex) -> None:
    """Templates come once each over the epochs and crops change."""
    three = {"templates": ["a {c}", "the {c}", "{c}!"]}
    texts, crops = defaultdict(list), defaultdict(set)
    for batch in batches(shards, 0, -(-6 * 53 // 8), dataset=three):
        for key, text, image in zip(batch.keys, batch.captions, batch.images, strict=True):
            texts[key].append(text)
            crops[key].add(image.numpy().tobytes())
    for drawn in texts.values():
        assert len(set(drawn[:3])) == 3
        assert len(set(drawn[3:6])) == 3
    assert len({tuple(text[:2] for text in drawn[:3]) for drawn in texts.values()}) > 3
    assert sum(len(different) >= 4 for different in crops.values()) > 45


def test_the_seed_changes_order_templates_and_crops(shards: ShardIndex) -> None:
    one, other = (
        {
            key: (text, image.sum().item())
            for batch in batches(shards, 0, 6, dataset={"seed": seed})
            for key, text, image in zip(batch.keys, batch.captions, batch.images, strict=True)
        }
        for seed in (0, 1)
    )
    common = one.keys() & other.keys()
    assert one.keys() != other.keys()
    assert sum(one[key] != other[key] for key in common) > 0.9 * len(common)


def test_reference_preprocessing_keeps_the_stream(shards: ShardIndex) -> None:
    """Reference preprocessing is the same stream with other pixels."""
    for fast, reference in zip(
        batches(shards, 0, 4), batches(shards, 0, 4, dataset={"preprocessing": "reference"}), strict=True
    ):
        assert (fast.keys, fast.captions) == (reference.keys, reference.captions)
        assert (fast.images.int() - reference.images.int()).abs().max() <= 2


def test_own_captions_are_used_before_templates(shards_of: ShardsOf, photo: Photo, encode: Encode) -> None:
    jpeg = encode(photo(1), "JPEG")
    index = shards_of([{"jpg": jpeg, "cls": b"0", "txt": b"one\ntwo\\nlines\n\n"}, {"jpg": jpeg, "cls": b"0"}] * 4)
    texts = Counter(text for batch in batches(index, 0, 8, dataset={"templates": "simple"}) for text in batch.captions)
    assert texts == {"one": 16, "two\\nlines": 16, "a photo of a hat.": 32}


def test_the_trainers_random_state_is_left_alone(shards: ShardIndex) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(shards, 0, 2)
    batches(shards, 0, 2, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dataset_that_has_been_read_can_be_pickled(shards: ShardIndex) -> None:
    data = dataset(shards)
    first = data[5]
    assert torch.equal(pickle.loads(pickle.dumps(data))[5].image, first.image)


@pytest.mark.slow
def test_spawned_workers_make_the_same_batches(shards: ShardIndex) -> None:
    assert same(batches(shards, 2, 3, workers=1, start_method="spawn")[0], batches(shards, 2, 3)[0])


def lengths(captions: list[str]) -> torch.Tensor:
    """A tokenizer that pickles: the length of each caption."""
    return torch.tensor([[len(caption)] for caption in captions])


@pytest.mark.parametrize("method", [None, "forkserver"])
def test_workers_make_the_tokens_of_their_batches(shards: ShardIndex, method: str | None) -> None:
    made = batches(shards, 0, 3, workers=2, tokenizer=lengths, start_method=method)
    assert [batch.tokens.tolist() for batch in made if batch.tokens is not None] == [
        lengths(batch.captions).tolist() for batch in made
    ]
    assert batches(shards, 0, 1)[0].tokens is None


def test_a_pinned_batch_pins_all_that_goes_to_the_device(shards: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batch = batches(shards, 0, 1, tokenizer=lengths)[0].pin_memory()
    assert {id(tensor) for tensor in pinned} == {id(batch.images), id(batch.labels), id(batch.tokens)}


# ---- what is wrong with single images: each has a named outcome, and the position stays a function of the step


def odd_images(photo: Photo, encode: Encode) -> dict[str, tuple[dict[str, bytes], str]]:
    """Members of an odd sample and what its report says; '' for one that is trained on."""
    jpeg = encode(photo(1), "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    label = {"cls": b"0"}
    return {
        "cut jpeg": ({"jpg": jpeg[:-60], **label}, "cannot be decoded (image file is truncated"),
        "zeros": ({"jpg": bytes(500), **label}, "not an image"),
        "empty": ({"jpg": b"", **label}, "no bytes"),
        "no image": (label, "no image among its members (cls)"),
        "no text": ({"jpg": jpeg}, "neither caption nor class among its members (jpg)"),
        "unknown class": ({"jpg": jpeg, "cls": b"7"}, "its class '7' is not in the index"),
        "huge": (
            {"png": encode(Image.new("1", (400, 300)), "PNG"), **label},
            "400 x 300 pixels, more than the limit of 100000",
        ),
        "cmyk": ({"jpg": encode(photo(2).convert("CMYK"), "JPEG"), **label}, ""),
        "16 bit": ({"png": encode(photo(2).convert("I;16"), "PNG"), **label}, ""),
        "turned": ({"jpg": encode(photo(2), "JPEG", exif=exif), **label}, ""),
        "palette": ({"png": encode(photo(2).convert("P"), "PNG"), **label}, ""),
    }


@pytest.mark.parametrize("name", odd_images(lambda *a: Image.new("RGB", (8, 8)), lambda *a, **k: b"").keys())
def test_an_odd_image_is_trained_on_or_replaced_and_named(
    shards_of: ShardsOf, photo: Photo, encode: Encode, name: str
) -> None:
    good = [{"jpg": encode(photo(number), "JPEG"), "cls": b"0"} for number in range(24)]
    odd, reason = odd_images(photo, encode)[name]
    index = shards_of([*good[:9], odd, *good[10:]])
    options = {"dataset": {"max_pixels": 100_000, "streams": 4}, "global_batch": 8}
    found = batches(index, 0, 6, **options)
    bad = [line for batch in found for line in batch.bad]
    keys = Counter(key for batch in found for key in batch.keys)
    if not reason:
        assert bad == []
        assert set(keys.values()) == {2}
        return
    assert bad == [bad[0]] * 2
    assert bad[0].startswith(f"shard-00001.tar/k009: {reason}")
    assert "shard-00001.tar/k009" not in keys
    assert keys.total() == 48
    assert sorted(keys.values())[-1] <= 4
    for again in (batches(index, 0, 6, **options), batches(index, 0, 6, **options, workers=2)):
        assert all(same(a, b) for a, b in zip(found, again, strict=True))
    two = [batches(index, 0, 6, **options, rank=rank, world=2) for rank in range(2)]
    assert all(rows([part[step] for part in two]) == rows([found[step]]) for step in range(6))
    assert sorted(line for part in two for batch in part for line in batch.bad) == bad


def test_corrupt_images_are_named_and_batches_are_full(shards_of: ShardsOf, photo: Photo, encode: Encode) -> None:
    """Three percent of corrupt images are all named and every batch is full."""
    images = [encode(photo(number, 24, 24), "JPEG") for number in range(10)]
    members = [{"jpg": images[number % 10], "cls": b"0"} for number in range(200)]
    broken = [13, 14, 77, 120, 121, 199]
    for number in broken:
        members[number] = {"jpg": members[number]["jpg"][:-40], "cls": b"0"}
    found = batches(shards_of(members, per_shard=50), 0, 25, dataset={"window": 2048})
    named = sorted(line.partition(":")[0].partition("/")[2] for batch in found for line in batch.bad)
    assert named == [f"k{number:03d}" for number in broken]
    assert all(len(batch.keys) == 8 for batch in found)


def test_shards_of_bad_images_stop_with_the_first(shards_of: ShardsOf) -> None:
    """Shards of nothing but bad images stop with the first one."""
    index = shards_of([{"jpg": b"x", "cls": b"0"}] * 16)
    with pytest.raises(ConfigError, match=r"64 samples in a row are bad, first shard-0000\d.tar/k0\d\d: not an image"):
        batches(index, 0, 1)


# ---- what is wrong with a shard: always an error, in the trainer's process and without a traceback of the worker


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_with_fewer_samples_than_its_index_is_an_error(
    shards_of: ShardsOf, reindex: Callable[[ShardIndex], ShardIndex], photo: Photo, encode: Encode, workers: int
) -> None:
    index = shards_of([{"jpg": encode(photo(1), "JPEG"), "cls": b"0"}] * 16)
    path = index.directory / "shard-00001.tar"
    with tarfile.open(path) as tar:
        files = [(member, tar.extractfile(member).read()) for member in tar.getmembers()[:10]]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for member, data in files:
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(
        TarError, match=r"shard-00001.tar: 5 samples where its index has 8; pack the source again"
    ) as caught:
        batches(reindex(index), 0, 2, workers=workers)
    assert "Traceback" not in str(caught.value)


def test_a_damaged_header_is_an_error_and_not_a_smaller_epoch(
    shards_of: ShardsOf, reindex: Callable[[ShardIndex], ShardIndex], photo: Photo, encode: Encode
) -> None:
    index = shards_of([{"jpg": encode(photo(1), "JPEG"), "cls": b"0"}] * 16)
    path = index.directory / "shard-00001.tar"
    with tarfile.open(path) as tar:
        at = tar.getmembers()[8].offset
    with path.open("r+b") as file:
        file.seek(at + 100)
        file.write(b"garbage")
    with pytest.raises(TarError, match=f"shard-00001.tar: damaged header at byte {at}"):
        batches(reindex(index), 0, 2, workers=1)


def test_a_shard_that_is_cut_while_training_is_an_error(shards_of: ShardsOf, photo: Photo, encode: Encode) -> None:
    index = shards_of([{"jpg": encode(photo(1), "JPEG"), "cls": b"0"}] * 16)
    data = dataset(index)
    loader = iter(train_loader(data, global_batch=16, start_step=0, stop_step=2, workers=0))
    next(loader)
    os.truncate(index.directory / "shard-00000.tar", 2000)
    with pytest.raises(TarError, match=r"shard-00000.tar: k00\d.\w+ ends after"):
        next(loader)


def test_streams_that_do_not_fit_are_refused_first(shards: ShardIndex) -> None:
    """Streams that do not fit are refused before anything is read."""
    for options, message in (
        ({"global_batch": 12}, "global_batch_size: 12"),
        ({"world": 3}, "cannot be shared by 3 ranks"),
        ({"rank": 2, "world": 2}, "rank 2 is not in a world of 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            batches(shards, 0, 1, **options)


def test_many_shards_do_not_need_many_open_files(
    shards_of: ShardsOf, photo: Photo, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.train.stream.OPEN_TARS", 3)
    index = shards_of([{"jpg": encode(photo(1, 9, 9), "JPEG"), "cls": b"0"}] * 40, per_shard=2)
    before, data = len(os.listdir("/proc/self/fd")), dataset(index)
    keys = [data[position].key for position in range(40)]
    assert len(set(keys)) == 40
    assert len(os.listdir("/proc/self/fd")) - before == 3


def test_labels_are_minus_one_without_classes(shards_of: ShardsOf, photo: Photo, encode: Encode) -> None:
    index = shards_of([{"jpg": encode(photo(1), "JPEG"), "txt": b"a hat"}] * 8, classes=None)
    batch = batches(index, 0, 1)[0]
    assert batch.labels.tolist() == [-1] * 8
    assert list(itertools.chain(batch.captions)) == ["a hat"] * 8


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_whose_caption_is_cut_are_named(shards: ShardIndex, workers: int) -> None:
    """The tokenizer here gives each caption its length, and those of an even length are too long."""
    options = {"tokenizer": _lengths, "find_cut": _even, "workers": workers}
    for batch in batches(shards, 0, 2, **options):
        wanted = [key for key, text in zip(batch.keys, batch.captions, strict=True) if len(text) % 2 == 0]
        assert batch.cut == wanted and batch.cut


def _lengths(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[len(text)] for text in texts])


def _even(texts: list[str], tokens: torch.Tensor) -> list[int]:
    return [number for number in range(len(texts)) if int(tokens[number]) % 2 == 0]
