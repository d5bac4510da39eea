"""Class folders with millions of images -> training shards, by many processes and machines, resumable.

    OUT/plan.json                the source, seed and size of the packing; others are refused
    OUT/parts/shard-00012.json   this shard is complete: samples, bytes, sha256
    OUT/index.json               all shards are complete; the files above have been removed

The shard of each image follows from the listing and the seed, so parts of one job share only the folder, may begin and
end at the same moment, and may be divided differently later. Only the names of the files are in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from pipeline.config import ConfigError
from pipeline.data.images import MAX_PIXELS, BadImageError, decode
from pipeline.data.order import seeded_permutation, stable_hash
from pipeline.data.shards.index import (
    INDEX_NAME,
    Shard,
    ShardIndex,
    appearing,
    check_empty,
    disk_faults_as_errors,
    load_index,
    sample_members,
    write_index,
    write_tar,
)
from pipeline.data.sources.sample import Sample, sample_key
from pipeline.files import json_text, sha256_of

PLAN, PARTS = "plan.json", "parts"


@dataclass(frozen=True)
class Listing:
    """The images below ``root``: ``files[i]`` are the sorted names in ``folders[i]``, whose label is i."""

    root: Path
    folders: tuple[str, ...]
    files: tuple[list[str], ...]

    def __len__(self) -> int:
        return sum(len(names) for names in self.files)


class Packing:
    """The shards and their images. ``classes``: readable names by label. ``decoded``: decode every image once."""

    def __init__(
        self,
        listing: Listing,
        out: Path,
        classes: Sequence[str],
        *,
        seed: int = 0,
        samples_per_shard: int = 5000,
        decoded: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.listing, self.out, self.classes = listing, out, tuple(classes)
        self.seed, self.samples_per_shard = seed, samples_per_shard
        self.decoded, self.max_pixels = decoded, max_pixels
        self._order = seeded_permutation(len(listing), stable_hash("pack", seed))
        self._ends = np.cumsum([len(names) for names in listing.files])

    def __len__(self) -> int:
        """Number of shards."""
        return math.ceil(len(self.listing) / self.samples_per_shard)

    @property
    def digest(self) -> str:
        """Digest of everything that determines the bytes of the shards, except the images' own bytes."""
        inputs = [self.listing.folders, self.classes, self.seed, self.samples_per_shard]
        content = hashlib.sha256(json.dumps(inputs, ensure_ascii=False).encode())
        for names in self.listing.files:
            content.update("\0".join(names).encode("utf-8", "surrogateescape") + b"\1")
        return content.hexdigest()[:16]

    def samples(self, shard: int) -> list[Sample]:
        start = shard * self.samples_per_shard
        return [self._sample(int(i)) for i in self._order[start : start + self.samples_per_shard]]

    def _sample(self, number: int) -> Sample:
        label = int(np.searchsorted(self._ends, number, side="right"))
        file = self.listing.files[label][number - int(self._ends[label])]
        name = f"{self.listing.folders[label]}/{file}"
        return Sample(sample_key(name), name, self.listing.root / name, label)

    def write(self, shard: int) -> Shard:
        """Write one shard and the record that it is complete, unless both exist and agree."""
        record = self.out / PARTS / f"shard-{shard:05d}.json"
        path = self.out / f"shard-{shard:05d}.tar"
        done = read_record(record)
        if done is not None and _agrees(path, done):
            return done
        finished = _finished(self)  # by another job with the same shards
        if finished is not None:
            return finished.shards[shard]
        try:
            made = write_tar(path, self.samples(shard), self._members, table=True)
            _write_json(record, made.as_json())
        except ConfigError:
            finished = _finished(self)
            if finished is None:
                raise
            return finished.shards[shard]  # its end has removed all unfinished files, including this one
        return made

    def _members(self, sample: Sample) -> dict[str, bytes]:
        try:
            members = sample_members(sample)
            if self.decoded:
                decode(next(iter(members.values())), max_pixels=self.max_pixels)
        except BadImageError as error:
            raise ConfigError(
                f"{self.listing.root / sample.name}: {error}; nothing may be left out: copy it again, then repeat "
                "the same command, which continues"
            ) from error
        return members


def pack_in_parallel(
    packing: Packing,
    *,
    workers: int = 4,
    part: tuple[int, int] = (1, 1),
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ShardIndex | None:
    """Write the shards of part i of n, and the index if all others are complete; returns None while some are not.

    The same call continues an interrupted one: complete shards with their recorded sha256 are kept. ``on_progress``
    gets the numbers of finished and of all shards of the part. Raises ConfigError for an unreadable image, and if the
    folder holds something else.
    """
    finished = _claim(packing, force=force, alone=part[1] == 1)
    if finished is not None:
        return finished
    chosen = range(part[0] - 1, len(packing), part[1])
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _start_worker, (packing,)) as pool:
        writing = [pool.submit(_write_shard, shard) for shard in chosen]
        try:
            for done, future in enumerate(as_completed(writing), 1):
                future.result()
                if on_progress is not None:
                    on_progress(done, len(writing))
        except BrokenProcessPool as error:
            raise ConfigError(
                f"{packing.out}: a packing process was ended from outside (out of memory?); fewer --workers need less; "
                "the same command continues"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return _join(packing)


def _join(packing: Packing) -> ShardIndex | None:
    """Write the index once all shards exist. Parts that end together may all do it, because they write the same."""
    records = [read_record(packing.out / PARTS / f"shard-{shard:05d}.json") for shard in range(len(packing))]
    shards = [record for record in records if record is not None]
    if len(shards) == len(packing):
        source = {"format": "imagefolder", "name": packing.listing.root.name, "seed": packing.seed, "left_out": []}
        index = write_index(packing.out, shards, packing.classes, {**source, "plan": packing.digest})
    else:
        index = _finished(packing)  # written by another part, which has removed the records since
    if index is not None:
        _clear_begun(packing.out)
    return index


def _clear_begun(out: Path) -> None:
    """Remove the files that are not needed once the index exists, including unfinished shards of killed processes."""
    (out / PLAN).unlink(missing_ok=True)
    shutil.rmtree(out / PARTS, ignore_errors=True)
    for begun in out.glob("shard-*.part"):
        begun.unlink(missing_ok=True)


def read_record(file: Path) -> Shard | None:
    """The complete shard of a record; None without a record."""
    try:
        return Shard.from_json(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file}: damaged ({error}); remove it, and its shard is packed again") from error


def _agrees(path: Path, record: Shard) -> bool:
    return path.is_file() and path.stat().st_size == record.bytes and sha256_of(path) == record.sha256


def _claim(packing: Packing, *, force: bool, alone: bool) -> ShardIndex | None:
    """Claim the folder for this packing; returns its index if everything is done."""
    if force and not alone:
        raise ConfigError("--force: would remove what the other parts have written; empty the folder first")
    finished = _finished(packing)
    if finished is not None:
        return finished
    if force:
        _clear(packing.out)
    # Checked first: other parts of this job write after the plan, which is removed after the index is written.
    occupied = _holds_other_things(packing.out)
    plan = packing.out / PLAN
    if not plan.is_file():
        finished = _finished(packing)
        if finished is not None:
            return finished
        if occupied:
            check_empty(packing.out, force)
        _write_json(plan, {"digest": packing.digest, "images": len(packing.listing), "shards": len(packing)})
    _check_plan(packing)
    return None


def _holds_other_things(out: Path) -> bool:
    """Whether the folder holds anything but a plan that another part is writing at this moment."""
    return out.exists() and not (out.is_dir() and all(path.name.startswith((PLAN, PARTS)) for path in out.iterdir()))


def _clear(out: Path) -> None:
    with disk_faults_as_errors(out / PLAN):
        (out / INDEX_NAME).unlink(missing_ok=True)
        for old in out.glob("shard-*.tar"):
            old.unlink()
        _clear_begun(out)


def _finished(packing: Packing) -> ShardIndex | None:
    if not (packing.out / INDEX_NAME).is_file():
        return None
    index = load_index(packing.out)
    return index if index.source.get("plan") == packing.digest else None


def _check_plan(packing: Packing) -> None:
    try:
        known = json.loads((packing.out / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:  # another part has written the index since
        return
    if known["digest"] != packing.digest:
        raise ConfigError(
            f"{packing.out}: holds an unfinished packing of other files or settings ({known['images']} images in "
            f"{known['shards']} shards, here {len(packing.listing)} in {len(packing)}); give the same source and "
            "settings to continue it, or --force to start over"
        )


def _write_json(file: Path, content: dict[str, object]) -> None:
    with disk_faults_as_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with appearing(file) as temporary:
        temporary.write_text(json_text(content), encoding="utf-8")


_packing: Packing | None = None


def _start_worker(packing: Packing) -> None:
    """Start a forked worker, which shares the listing with its parent and ends with it, even if that is killed."""
    global _packing
    _packing = packing
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _write_shard(shard: int) -> Shard:
    assert _packing is not None
    return _packing.write(shard)
