"""From a config to a finished run: build every part, resume where a checkpoint lies, call the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from pipeline.config import Config, ConfigError
from pipeline.data.batches import Batches
from pipeline.data.shards.index import ShardIndex, load_index
from pipeline.data.train.stream import Batch, TrainDataset, train_loader
from pipeline.method.adapter import GradientWatch
from pipeline.model.load import Model
from pipeline.model.towers import inside_layers
from pipeline.tracking.tracker import Tracker
from pipeline.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from pipeline.training.cluster.distributed import World, keep_heap, label_logs, read_world, share_threads
from pipeline.training.cluster.lease import Lease, held
from pipeline.training.cluster.peers import meet, watched_peers
from pipeline.training.directory import claim, leave_mark, say, tracked
from pipeline.training.engine import (
    build_engine,
    full_parameters,
    optimizer_state,
    rest,
    restore_moments,
    start_process_group,
)
from pipeline.training.loop import StopRequest, train_steps
from pipeline.training.model import (
    build_model,
    checkpoint_state,
    classes_of,
    compiled_layers,
    gate_values,
    load_trainable,
    objective_of,
    settling_of,
    targets_of,
    trainable,
)
from pipeline.training.monitor import Monitor, Sink, TrainingFailed
from pipeline.training.optim import Rates, lr_factor, parameter_groups
from pipeline.training.settings import total_steps


class Watch(Protocol):
    """Somebody beside the run: told what it records, and asked after every step whether it shall stop."""

    def recorded(self, step: int, values: Mapping[str, float]) -> None:
        """The values that the journal gets at `step`; called on every rank, in step with the others."""

    def stop_requested(self) -> bool:
        """True on any rank: all save at the end of this step and leave."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What `train` did: the run's directory, steps done in all and whether the schedule is complete."""

    run_dir: Path
    step: int
    total_steps: int

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps


@dataclass(frozen=True)
class _Watched:
    """The tracker, and the one who watches."""

    tracker: Tracker
    watch: Watch

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.tracker.metrics(step, values)
        self.watch.recorded(step, values)


def train(config: Config, watch: Watch | None = None, label: str | None = None) -> Outcome:
    """Train until the schedule ends or a signal asks to stop; the same call again continues from the last checkpoint.

    `label` is what the logs call the run, where its name does not say all.

    Raises ConfigError for every mistake of the user's, before the first step wherever it can be known; PeerLost when
    other ranks do not come or are lost.
    """
    world = read_world()
    share_threads(world)
    keep_heap(world)
    label_logs(world, label or config.name)
    run_dir = Path(config.out).absolute() / config.name
    with held(run_dir, world.is_main) as lease:
        outcome = _train_held(config, run_dir, world, lease, watch)
    if not outcome.finished and world.local_rank == 0:
        leave_mark()
    return outcome


@dataclass(frozen=True)
class _Job:
    """What is settled before anything is built."""

    config: Config
    run_dir: Path
    world: World
    index: ShardIndex
    total: int


def _train_held(config: Config, run_dir: Path, world: World, lease: Lease | None, watch: Watch | None) -> Outcome:
    index = load_index(config.data.train)
    total = total_steps(config, index.samples)
    job = _Job(config, run_dir, world, index, total)
    claim(run_dir, config, world)
    timeout = timedelta(seconds=config.train.timeout_s)
    store = meet(world, timeout)
    control = start_process_group(world, timeout, store)
    # Only now: rank 0 may have waited for an earlier job that was still saving, and all must find the same checkpoint.
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is not None and checkpoint.step >= total:
        say(world, f"{run_dir}: already trained for {total} steps")
        return Outcome(run_dir, checkpoint.step, total)
    for warning in warnings_of(config, total, index.samples):
        say(world, f"warning: {warning}")
    with watched_peers(store, world):
        model = build_model(config, classes_of(config, index))
        if checkpoint is not None:
            _check_data(checkpoint, index)
            load_trainable(model, checkpoint)
            say(world, f"{run_dir}: continuing at step {checkpoint.step} of {total}")
        digests = {"selora.base_digest": model.digest, "selora.data_digest": index.digest}
        with tracked(config, run_dir, world, digests, total) as tracker:
            sink = tracker if watch is None else _Watched(tracker, watch)
            step = _train(job, model, checkpoint, control, sink, watch, lease)
    return Outcome(run_dir, step, total)


def _check_data(checkpoint: Checkpoint, index: ShardIndex) -> None:
    """The position of a run is a number; it means the same samples only in the same shards."""
    trained = checkpoint.state["data_digest"]
    if trained != index.digest:
        raise ConfigError(
            f"{checkpoint.path}: was trained on shards {trained[:12]}, but data.train={index.folder.location} "
            f"now holds {index.digest[:12]}: put the old shards back, or start a run under another name"
        )


def warnings_of(config: Config, total: int, samples: int) -> list[str]:
    """Settings that are legal and yet cannot do what they say in a run of `total` steps over `samples` images."""
    found, batch = [], config.train.global_batch_size
    if batch > samples:
        found.append(
            f"train.global_batch_size={batch} is more than the {samples} images there are: an image stands several "
            "times in a batch, and is pushed away from its own caption"
        )
    if config.train.warmup_steps >= total:
        found.append(f"train.warmup_steps={config.train.warmup_steps} outlasts the run's {total} steps")
    if config.gated and config.train.optimizer == "adamw":
        rate, margin = config.gate.lr or config.train.lr, config.gate.init - config.gate.threshold
        travel = rate * sum(lr_factor(step, config.train.warmup_steps, total) for step in range(total))
        # Adam moves a score by at most its learning rate a step, whatever gate.lam is.
        if travel < margin:
            found.append(
                f"no gate can close: a score can travel {travel:.3g} in {total} steps, but {margin:.3g} lie between "
                f"gate.init and gate.threshold; raise gate.lr to about {2 * margin / travel * rate:.1g} or train longer"
            )
    return found


def _train(
    job: _Job,
    model: Model,
    checkpoint: Checkpoint | None,
    control: dist.ProcessGroup,
    sink: Sink,
    watch: Watch | None,
    lease: Lease | None,
) -> int:
    config, net, settings, total = job.config, model.model, job.config.train, job.total
    rates = Rates(settings.lr, settings.rest_lr or settings.lr, config.gate.lr or settings.lr)
    groups = parameter_groups(trainable(net), inside_layers, rates, settings.weight_decay)
    gradients = GradientWatch(net)
    engine = build_engine(objective_of(config, model), groups, config, job.world, compiled_layers(config, model))
    named = trainable(net)
    settling = settling_of(config, model)
    start = 0
    if checkpoint is not None:
        restore_moments(engine, named, checkpoint.moments())
        start = checkpoint.step
        if settling is not None:
            settling.restore(checkpoint.state["settling"])
    monitor = _monitor(job, sink, control, partial(gate_values, net, settling))

    def settle() -> None:
        for block in settling.observe() if settling is not None else []:
            rest(engine, block.lowrank.parameters(), at_zero=True)
            rest(engine, block.undecayed(), at_zero=False)
        if not trainable(net):
            raise TrainingFailed(
                "every gate has settled and train.train_rest=none: nothing is left to train. "
                "Lower gate.lam, or set gate.settle_steps=null"
            )

    def save(done: int) -> None:
        parameters, moments = full_parameters(named), optimizer_state(engine, named)
        if job.world.is_main:
            if lease is not None:
                lease.check()
            state = checkpoint_state(config, model, job.index.digest, done, job.world, settling)
            save_checkpoint(job.run_dir, parameters, moments, state, keep_last=settings.keep_last)
        dist.barrier(control)

    def asked() -> bool:
        return (watch is not None and watch.stop_requested()) or (lease is not None and lease.lost)

    with StopRequest(asked) as stop:
        try:
            done = train_steps(
                engine,
                _batches(job, model, start),
                targets_of=partial(targets_of, model),
                factor=lambda step: lr_factor(step, settings.warmup_steps, total),
                peak_lr=settings.lr,
                seed=config.seed,
                gradients=gradients,
                settle=settle,
                monitor=monitor,
                save=save,
                checkpoint_every=settings.checkpoint_every,
                total_steps=total,
                stop=stop,
                control=control,
            )
        finally:
            monitor.close()
    if done < total:
        say(job.world, f"stopped by a signal at step {done} of {total}, saved; the same command continues")
    return done


def _monitor(job: _Job, sink: Sink, control: dist.ProcessGroup, gates: Callable[[], dict[str, float]]) -> Monitor:
    config = job.config
    return Monitor(
        world=job.world,
        control=control,
        sink=sink,
        gates=gates,
        total_steps=job.total,
        global_batch_size=config.train.global_batch_size,
        log_every=config.train.log_every,
        gates_every=config.train.gates_every,
        bad_limit=config.data.max_bad_share * job.index.samples,
        negatives=not config.classifies,
    )


def _batches(job: _Job, model: Model, start: int) -> Batches[Batch]:
    config, data = job.config, job.config.data
    dataset = TrainDataset(
        job.index,
        size=model.preprocess_cfg["size"],
        seed=config.seed,
        streams=data.streams,
        window=data.shuffle_window,
        templates=data.templates,
        crop_scale=data.crop_scale,
        flip=data.flip,
        preprocessing=data.preprocessing,
        max_pixels=data.max_pixels,
    )
    return train_loader(
        dataset,
        global_batch=config.train.global_batch_size,
        start_step=start,
        stop_step=job.total,
        rank=job.world.rank,
        world=job.world.world_size,
        sharing=job.world.local_world_size,
        workers=data.workers,
        ahead=data.read_ahead,
        pin=job.world.device.type == "cuda",
    )
