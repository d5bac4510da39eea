"""From a config to a finished run: claim its directory, meet the other ranks, build the parts, call the loop."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from pipeline.config import Config, ConfigError
from pipeline.data.reference.samples import ReferenceData
from pipeline.data.shards.index import ShardIndex, load_index
from pipeline.model.clip import Clip, with_logit_bias
from pipeline.model.load import Model
from pipeline.model.weights import has_bias
from pipeline.tracking.tracker import Tracker
from pipeline.training.build import TrainingJob, build_training, start_logit_bias
from pipeline.training.checkpoint import Checkpoint, latest_checkpoint
from pipeline.training.cluster.cards import hidden_cards, own_cards
from pipeline.training.cluster.distributed import World, label_logs, read_world, set_heap, share_threads
from pipeline.training.cluster.lease import Lease, held
from pipeline.training.cluster.peers import meet, watched_peers
from pipeline.training.directory import claim, leave_mark, say, tracked
from pipeline.training.engine import start_process_group
from pipeline.training.loop import StopRequest, train_steps
from pipeline.training.model import attach_blocks, classes_of, load_once, load_trainable
from pipeline.training.monitor import Sink
from pipeline.training.optim import lr_factor
from pipeline.training.reference import build_reference
from pipeline.training.settings import total_steps


class Watch(Protocol):
    """An observer of the run, such as a trial of a sweep."""

    def recorded(self, step: int, values: Mapping[str, float]) -> None:
        """Called on every rank with the metrics that the journal records at `step`."""

    def stop_requested(self) -> bool:
        """Called after each step; True on any rank makes all ranks save and end."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """Result of `train`: the run's directory, the total of finished steps, and whether the schedule is complete."""

    run_dir: Path
    step: int
    total_steps: int

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps


@dataclass(frozen=True)
class _Watched:
    """A tracker that also passes its metrics to an observer."""

    tracker: Tracker
    watch: Watch

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.tracker.metrics(step, values)
        self.watch.recorded(step, values)


def train(config: Config, watch: Watch | None = None, label: str | None = None) -> TrainResult:
    """Train until the schedule ends or a signal requests a stop; the same call continues from the last checkpoint.

    Args:
        label: name of the run in the logs; None: `name` of the config.

    Returns:
        `finished` is False if a signal or the observer stopped the run, which has then saved a checkpoint.

    Raises:
        ConfigError: for every mistake of the user, before the first step where possible.
        PeerLost: other ranks do not arrive or are lost.
    """
    world = read_world(device=config.train.device)
    share_threads(world)
    set_heap(world, keep=config.train.stage(world.world_size) < 3)
    label_logs(world, label or config.name)
    run_dir = Path(config.out).absolute() / config.name
    with held(run_dir, world.is_main) as lease:
        outcome, control = _train_held(config, run_dir, world, lease, watch)
    if not outcome.finished:
        if world.local_rank == 0:
            leave_mark()
        # A launcher ends all ranks once one exits with a code other than 0; rank 0 may still be closing its journal.
        with suppress(RuntimeError):  # there is no need to wait for a rank that has already ended
            dist.barrier(control)
    return outcome


def _train_held(
    config: Config, run_dir: Path, world: World, lease: Lease | None, watch: Watch | None
) -> tuple[TrainResult, dist.ProcessGroup]:
    index = load_index(config.data.train)
    total = total_steps(config, index.samples)
    claim(run_dir, config, world)
    timeout = timedelta(seconds=config.train.timeout_s)
    store = meet(world, timeout)
    control = start_process_group(world, timeout, store)
    # Not before: rank 0 may have waited for an earlier job that was still saving, and all must find the same
    # checkpoint.
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is not None and checkpoint.step >= total:
        say(world, f"{run_dir}: already trained for {total} steps")
        return TrainResult(run_dir, checkpoint.step, total), control
    if world.device.type == "cpu" and config.train.device == "auto" and hidden_cards() and (cards := own_cards()):
        say(world, f"warning: {world.host} has {cards} NVIDIA cards, CUDA_VISIBLE_DEVICES hides them: the CPU trains")
    for warning in warnings_of(config, total, index.samples):
        say(world, f"warning: {warning}")
    with watched_peers(store, world):
        model = load_once(config, classes_of(config, index), world, control)
        reference = build_reference(config, model, world)
        job = TrainingJob(config, run_dir, world, index, total, control, lease)
        if config.train.loss == "sigmoid" and isinstance(model, Clip) and not has_bias(model.model):
            model = with_logit_bias(model, _start_of_bias(job, model, checkpoint))
        attach_blocks(config, model)
        if checkpoint is not None:
            _check_data(checkpoint, index)
            load_trainable(model, checkpoint)
            say(world, f"{run_dir}: continuing at step {checkpoint.step} of {total}")
        digests = {"selora.base_digest": model.digest, "selora.data_digest": index.digest}
        with tracked(config, run_dir, world, digests, total) as tracker:
            sink = tracker if watch is None else _Watched(tracker, watch)
            step = _train(job, model, reference, checkpoint, sink, watch)
    return TrainResult(run_dir, step, total), control


def _start_of_bias(job: TrainingJob, model: Clip, checkpoint: Checkpoint | None) -> float:
    if checkpoint is not None:
        return checkpoint.state["model"]["added_bias"]
    start = start_logit_bias(job, model)
    say(job.world, f"train.loss=sigmoid: {model.name} has no logit bias and gets one, which starts at {start:g}")
    return start


def _check_data(checkpoint: Checkpoint, index: ShardIndex) -> None:
    """Compare the digest of the shards, because a step means the same samples only in the same shards."""
    trained = checkpoint.state["data_digest"]
    if trained != index.digest:
        raise ConfigError(
            f"{checkpoint.path}: was trained on shards {trained[:12]}, but data.train={index.folder.location} "
            f"now holds {index.digest[:12]}: put the old shards back, or start a run under another name"
        )


def warnings_of(config: Config, total: int, samples: int) -> list[str]:
    """Warnings about valid settings that have no effect or harm in a run of `total` steps over `samples` images."""
    found, batch = [], config.train.global_batch_size
    if batch > samples:
        found.append(
            f"train.global_batch_size={batch} exceeds the {samples} images: an image occurs several "
            "times in a batch, and is pushed away from its own caption"
        )
    if config.train.warmup_steps >= total:
        found.append(f"train.warmup_steps={config.train.warmup_steps} outlasts the run's {total} steps")
    if config.gated and not config.gate.budgeted and config.train.optimizer == "adamw":
        rate, margin = config.gate.lr or config.train.lr, config.gate.init - config.gate.threshold
        travel = rate * sum(lr_factor(step, config.train.warmup_steps, total) for step in range(total))
        # Adam moves a score by at most its learning rate per step, whatever gate.lam is.
        if travel < margin:
            found.append(
                f"no gate can close: a score can travel {travel:.3g} in {total} steps, but gate.init and "
                f"gate.threshold are {margin:.3g} apart; raise gate.lr to about "
                f"{2 * margin / travel * rate:.1g} or train longer"
            )
    return found


def _train(
    job: TrainingJob,
    model: Model,
    reference: ReferenceData | None,
    checkpoint: Checkpoint | None,
    sink: Sink,
    watch: Watch | None,
) -> int:
    training, monitor = build_training(job, model, reference, checkpoint, sink)

    def also() -> bool:
        return (watch is not None and watch.stop_requested()) or (job.lease is not None and job.lease.lost)

    with StopRequest(also) as stop:
        try:
            done = train_steps(training, stop)
        finally:
            monitor.close()
            training.close()
    if done < job.total:
        say(job.world, f"stopped by a signal at step {done} of {job.total}, saved; the same command continues")
    return done
