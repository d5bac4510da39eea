"""Reports of a run while it trains: metrics to the tracker, a line or bar to the user, an error if it diverges."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from pipeline.config import ConfigError
from pipeline.display import duration
from pipeline.training.cluster.distributed import World, gather_numbers
from pipeline.training.loop import Step

# Bad samples that a rank names; the metric data/bad_samples counts all of them.
NAMED = 20


class Sink(Protocol):
    """Receiver of metrics; every tracker of pipeline.tracking is one."""

    def metrics(self, step: int, values: dict[str, float]) -> None: ...


class TrainingBatch(Protocol):
    """The part of a batch that the monitor reads."""

    step: int
    captions: list[str]
    keys: list[str]
    bad: list[str]
    retries: int
    cut: Sequence[str]


class TrainingFailed(ConfigError):
    """Training cannot continue for a reason that the user can act on: a loss that is not finite, or bad samples."""


@dataclass
class Monitor:
    """Collects the metrics of every step and reports them every `log_every` steps.

    Reading a loss waits for the device, so losses are kept as tensors and read together at each interval; a loss that
    is not finite is still reported with its step and shards.
    """

    world: World
    control: dist.ProcessGroup
    sink: Sink
    gates: Callable[[], dict[str, float]]
    drift: Callable[[], dict[str, float]]
    total_steps: int
    global_batch_size: int
    peak_lr: float
    log_every: int
    gates_every: int
    bad_limit: float
    # Whether an image is contrasted with the captions of other images.
    negatives: bool
    # Steps that DeepSpeed skipped because the norm of a gradient to be clipped was not finite.
    skipped_steps: Callable[[], int] = lambda: 0
    _window: list[tuple[int, dict[str, Tensor], list[str]]] = field(default_factory=list)
    _bad: set[str] = field(default_factory=set)
    _retries: int = 0
    _cut: int = 0
    _since: float = field(default_factory=time.perf_counter)
    _open: dict[str, bool] = field(default_factory=dict)
    _drift: dict[str, float] = field(default_factory=dict)
    _first_cut: str = ""
    _told_cut: bool = False
    _bar: tqdm | None = None

    def after_step(self, step: Step) -> None:
        """Record one finished step. Collective at every `log_every`-th step."""
        batch: TrainingBatch = step.batch
        shards = sorted({key.rpartition("/")[0] for key in batch.keys})
        self._window.append((batch.step, step.losses, shards))
        self._name_bad(batch.bad)
        self._retries += batch.retries
        self._cut += len(batch.cut)
        if batch.cut and not self._first_cut:
            self._first_cut = batch.cut[0]
        done = step.done
        if done % self.log_every and done != self.total_steps:
            return
        values = self.check_finite()
        values |= {
            "train/lr": step.lr_factor * self.peak_lr,
            "train/images_per_s": len(self._window) * self.global_batch_size / (time.perf_counter() - self._since),
            "train/samples_seen": float(done * self.global_batch_size),
            "data/bad_samples": self._count_bad(),
        }
        values |= self._counts()
        if self.negatives:
            values["train/effective_negatives"] = self._effective_negatives(batch.captions)
        if skipped := self.skipped_steps():
            values["train/skipped_steps"] = float(skipped)
        due = done % self.gates_every == 0 or done == self.total_steps
        values |= self._gate_values(due) | self._drift_values(due)
        self._window.clear()
        self._since = time.perf_counter()
        self.sink.metrics(done, values)
        self._show(done, values)

    def close(self) -> None:
        """End the line of the progress bar."""
        if self._bar is not None:
            self._bar.close()

    def check_finite(self) -> dict[str, float]:
        """Mean losses over all ranks and the steps since the last report. Collective.

        Raises TrainingFailed naming the first step whose loss is not finite, and the shards this rank read for it.
        """
        if not self._window:
            return {}
        names = list(self._window[0][1])
        local = torch.stack(
            [torch.stack([losses[name].float() for name in names]) for _, losses, _ in self._window]
        ).cpu()
        mean = gather_numbers(local.flatten(), self.control).view(self.world.world_size, *local.shape).mean(0)
        finite = torch.isfinite(mean).all(1)
        if not finite.all():
            step, _, shards = self._window[int((~finite).int().argmax())]
            raise TrainingFailed(
                f"step {step}: the loss is not finite (rank {self.world.rank} was reading {', '.join(shards)}). "
                f"Lower train.lr, lengthen train.warmup_steps or use model.precision=fp32; "
                f"the last checkpoint holds the state before it"
            )
        return {
            f"train/{'loss' if name == 'total' else name}": value
            for name, value in zip(names, mean.mean(0).tolist(), strict=True)
        }

    def _effective_negatives(self, captions: list[str]) -> float:
        """Mean number of captions in the global batch that differ from a sample's own: its true negatives."""
        hashes = torch.tensor([hash_text(caption) for caption in captions], dtype=torch.int64)
        counts = torch.unique(gather_numbers(hashes, self.control), return_counts=True)[1].double()
        return float((counts * (counts.sum() - counts)).sum() / counts.sum())

    def _name_bad(self, bad: Sequence[str]) -> None:
        """Name the first `NAMED` bad samples of this rank, each once; another sample of the stream replaced it."""
        for name in dict.fromkeys(bad):
            if name not in self._bad and len(self._bad) < NAMED:
                tqdm.write(f"bad sample, another one is taken: {name}", file=sys.stderr)
            self._bad.add(name)

    def _count_bad(self) -> float:
        # Another rank may read the same sample in the next epoch: names are counted, not occurrences.
        longest = int(gather_numbers(torch.tensor([len(self._bad)]), self.control).max())
        names = [hash_text(name) for name in self._bad] + [-1] * (longest - len(self._bad))
        gathered = gather_numbers(torch.tensor(names, dtype=torch.int64), self.control) if longest else torch.empty(0)
        total = float(gathered[gathered >= 0].unique().numel())
        if total > self.bad_limit:
            named = "\n  ".join(sorted(self._bad)[:10])
            raise TrainingFailed(
                f"{int(total)} bad samples, more than data.max_bad_share allows ({self.bad_limit:g}):\n  {named}\n"
                f"run `selora verify` on the shards and repack them, or raise data.max_bad_share"
            )
        return total

    def _counts(self) -> dict[str, float]:
        """Sums over all ranks; the first cut caption on rank 0 is named once."""
        retries, cut = (
            gather_numbers(torch.tensor([self._retries, self._cut]), self.control).view(-1, 2).sum(0).tolist()
        )
        if cut and self.world.is_main and not self._told_cut:
            self._told_cut = True
            example = f", as in {self._first_cut}" if self._first_cut else ""
            tqdm.write(
                f"warning: captions with more tokens than the model reads, whose ends are cut off: {cut} so far"
                f"{example}; data/cut_captions counts them",
                file=sys.stderr,
            )
        return {"data/retries": float(retries)} | ({"data/cut_captions": float(cut)} if cut else {})

    def _drift_values(self, due: bool) -> dict[str, float]:
        found = self.drift() if due or not self._drift else {}
        self._drift = found or self._drift
        return found

    def _gate_values(self, due: bool) -> dict[str, float]:
        scores = self.gates() if due or not self._open else None
        if not scores:
            return {}
        now = {name: bool(value) for name, value in scores.items() if name.startswith("open/")}
        toggles = sum(now[name] != before for name, before in self._open.items())
        self._open = now
        return {
            **{name: value for name, value in scores.items() if not name.startswith("open/")},
            "adapter/active_blocks": float(sum(now.values())),
            "adapter/active_share": sum(now.values()) / len(now),
            "adapter/toggles": float(toggles),
        }

    def _show(self, done: int, values: dict[str, float]) -> None:
        if not self.world.is_main:
            return
        active = f" active {sum(self._open.values())}/{len(self._open)}" if self._open else ""
        retries = f" retries {values['data/retries']:.0f}" if values["data/retries"] else ""
        skipped = f" skipped {values['train/skipped_steps']:.0f}" if "train/skipped_steps" in values else ""
        drift = "".join(f" {name[5:].replace('_', ' ')} {value:.4f}" for name, value in self._drift.items())
        text = f"loss {values['train/loss']:.4f} lr {values['train/lr']:.2e}{drift}{active}{retries}{skipped}"
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(total=self.total_steps, unit="step", dynamic_ncols=True)
            self._bar.update(done - self._bar.n)
            self._bar.set_postfix_str(text)
        else:
            rate = values["train/images_per_s"]
            left = (self.total_steps - done) * self.global_batch_size / rate
            sys.stderr.write(f"step {done}/{self.total_steps} {text} {rate:.0f} img/s {duration(left)} left\n")


def hash_text(text: str) -> int:
    """A 63-bit number for a caption, equal on every rank (Python's own hash is salted per process)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
