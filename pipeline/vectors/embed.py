"""Embed a list of items in parts, which any number of ranks share and a later call reuses.

A part is one forward of fixed items, so vectors depend neither on the number of ranks nor on interruptions. Parts are
kept in OUT.parts until all of them exist; then they become one file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.images import BadImageError
from pipeline.evaluation.measures.ranks import Ranks
from pipeline.files import read_json, replace_bytes, replace_json
from pipeline.vectors.embedder import Embedder
from pipeline.vectors.items import Item
from pipeline.vectors.store import Vectors, check_suffix, write_vectors

PLAN = "plan.json"
_EVERY = 5.0  # seconds between lines of progress
Say = Callable[[str], None]
Loaded = str | Tensor | BadImageError


@dataclass(frozen=True)
class Embedded:
    """Result of an embedding. left_out: key -> why an image cannot be read."""

    file: Path
    written: int
    left_out: dict[str, str]

    def __str__(self) -> str:
        left = f", {len(self.left_out)} left out" if self.left_out else ""
        return f"{self.file}: {self.written} vectors{left}"


def embed(
    embedder: Embedder,
    items: Sequence[Item],
    kind: str,
    out: Path,
    *,
    batch_size: int = 64,
    workers: int = 4,
    say: Say | None = None,
) -> Embedded:
    """Embed all items into `out`, continuing an earlier call that was stopped; every rank calls it.

    Args:
        embedder: the model.
        items: in the order of the vectors.
        kind: "images" or "texts", the same for all items.
        out: a .npy or .parquet file.
        batch_size: number of items in a forward, and in a part.
        workers: number of threads that decode images.
        say: called with lines of progress, on rank 0.

    Returns:
        The file of the vectors, and the images that are not in it.

    Raises:
        ConfigError: the file exists or has another extension, OUT.parts belongs to other items or another model, or no
            image can be read.
    """
    check_suffix(out)
    ranks = Ranks.current()
    folder = out.with_name(f"{out.name}.parts")
    starts = range(0, len(items), batch_size)
    plan = {"digest": _digest(embedder, items, kind, batch_size), "parts": len(starts)}
    done = ranks.from_first(lambda: _prepare(folder, out, plan))
    mine = [part for part in ranks.share(len(starts)) if part not in done]
    progress = _Progress(len(mine), batch_size, say if ranks.rank == 0 else None)

    def work() -> None:
        with ThreadPoolExecutor(workers) as pool:
            cut = ((part, items[starts[part] : starts[part] + batch_size]) for part in mine)
            for part, loaded in _ahead(pool, embedder, cut):
                _save(folder, part, embedder, [each.result() for each in loaded])
                progress.step()

    ranks.gather(work)
    return ranks.from_first(lambda: _join(folder, out, embedder, items, kind, batch_size))


def _prepare(folder: Path, out: Path, plan: dict[str, object]) -> set[int]:
    """The existing parts; OUT.parts is created if necessary."""
    if out.exists():
        raise ConfigError(f"{out} exists: choose another file, or remove it")
    if (folder / PLAN).is_file():
        if read_json(folder / PLAN) != plan:
            raise ConfigError(
                f"{folder} belongs to other items, another model or another --batch-size: remove it to start again"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        replace_json(folder / PLAN, plan)
    return {int(file.stem) for file in folder.glob("*.safetensors")}


def _digest(embedder: Embedder, items: Sequence[Item], kind: str, batch_size: int) -> str:
    sha = hashlib.sha256(json.dumps([embedder.digest, kind, batch_size, embedder.encoder.precision]).encode())
    for item in items:
        sha.update(item.key.encode("utf-8", "surrogateescape") + b"\0")
    return sha.hexdigest()


def _ahead(
    pool: ThreadPoolExecutor, embedder: Embedder, parts: Iterable[tuple[int, Sequence[Item]]]
) -> Iterator[tuple[int, list[Future[Loaded]]]]:
    """The parts with the content of their items, read while the previous part is computed."""
    waiting: deque[tuple[int, list[Future[Loaded]]]] = deque()
    for part, items in parts:
        waiting.append((part, [pool.submit(_load, embedder, item) for item in items]))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _load(embedder: Embedder, item: Item) -> Loaded:
    """A text, the pixels of an image, or the fault of an unreadable one."""
    if isinstance(item.content, str):
        return item.content
    try:
        return embedder.pixels(item.content.read_bytes())
    except BadImageError as error:
        return error
    except OSError as error:
        return BadImageError(error.strerror or str(error))


def _save(folder: Path, part: int, embedder: Embedder, loaded: Sequence[Loaded]) -> None:
    """Compute and store a part: vectors (n, D) of its readable items, their positions, and the faults of the others."""
    texts = [each for each in loaded if isinstance(each, str)]
    pixels = [each for each in loaded if isinstance(each, Tensor)]
    kept = torch.tensor([i for i, each in enumerate(loaded) if not isinstance(each, BadImageError)], dtype=torch.int64)
    vectors = torch.zeros(0, 0)
    if texts or pixels:
        vectors = embedder.texts(texts) if texts else embedder.images(torch.stack(pixels))
    faults = {str(i): str(each) for i, each in enumerate(loaded) if isinstance(each, BadImageError)}
    replace_bytes(_part(folder, part), save({"kept": kept, "vectors": vectors}, metadata=faults or None))


def _join(folder: Path, out: Path, embedder: Embedder, items: Sequence[Item], kind: str, batch_size: int) -> Embedded:
    """Join all parts into one file, and remove them."""
    keys, vectors, left_out = [], [], {}
    for number, start in enumerate(range(0, len(items), batch_size)):
        with safe_open(_part(folder, number), "pt") as part:
            kept = part.get_tensor("kept").tolist()
            keys += [items[start + i].key for i in kept]
            vectors += [part.get_tensor("vectors")] if kept else []
            left_out |= {items[start + int(i)].key: fault for i, fault in (part.metadata() or {}).items()}
    if not vectors:
        raise ConfigError(f"none of the {len(items)} images can be read: {next(iter(left_out.values()))}")
    write_vectors(out, Vectors(keys, torch.cat(vectors), embedder.name, embedder.digest, kind))
    shutil.rmtree(folder)
    return Embedded(out, len(keys), left_out)


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.safetensors"


class _Progress:
    """Prints a line every few seconds: the share done, the pace, and the time left at that pace."""

    def __init__(self, parts: int, size: int, say: Say | None) -> None:
        self.parts, self.size, self.say = parts, size, say
        self.done, self.started = 0, time.monotonic()
        self.reported = self.started

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.say is None or now - self.reported < _EVERY:
            return
        self.reported, pace = now, self.done / (now - self.started)
        left = (self.parts - self.done) / pace
        self.say(f"{100 * self.done / self.parts:.0f} %, {pace * self.size:.0f} a second and rank, {left:.0f} s left")
