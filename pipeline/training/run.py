"""From a config to a finished run: build every part, resume where a checkpoint lies, call the loop."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from pipeline.config import Config, ConfigError, flatten, load_config, to_yaml
from pipeline.data.batches import Batches
from pipeline.data.shards import ShardIndex, load_index
from pipeline.data.stream import Batch, TrainDataset, train_loader
from pipeline.method.adapter import GradientWatch, blocks
from pipeline.model.clip import Clip
from pipeline.model.towers import inside_layers
from pipeline.tracking.tracker import NullTracker, Tracker, environment_tags, open_tracker, watch_machine
from pipeline.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from pipeline.training.distributed import World, keep_heap, label_logs, read_world, share_threads
from pipeline.training.engine import (
    build_engine,
    full_parameters,
    optimizer_state,
    restore_moments,
    start_process_group,
)
from pipeline.training.lease import Lease, held
from pipeline.training.loop import StopRequest, train_steps
from pipeline.training.model import build_model, checkpoint_state, gate_values, load_trainable, trainable
from pipeline.training.monitor import Monitor, Sink
from pipeline.training.objective import Objective, PenaltySettings
from pipeline.training.optim import Rates, lr_factor, parameter_groups
from pipeline.training.peers import meet, watched_peers
from pipeline.training.settings import changed_settings, total_steps

_WATCHER_SECONDS = 10.0  # for a node's last sample of its machine


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
        _leave_mark()
    return outcome


def _train_held(config: Config, run_dir: Path, world: World, lease: Lease | None, watch: Watch | None) -> Outcome:
    index = load_index(config.data.train)
    total = total_steps(config, index.samples)
    _claim(run_dir, config, world)
    timeout = timedelta(seconds=config.train.timeout_s)
    store = meet(world, timeout)
    control = start_process_group(world, timeout, store)
    # Only now: rank 0 may have waited for an earlier job that was still saving, and all must find the same checkpoint.
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is not None and checkpoint.step >= total:
        _say(world, f"{run_dir}: already trained for {total} steps")
        return Outcome(run_dir, checkpoint.step, total)
    for warning in warnings_of(config, total):
        _say(world, f"warning: {warning}")
    with watched_peers(store, world):
        clip = build_model(config)
        if checkpoint is not None:
            _check_data(checkpoint, index)
            load_trainable(clip, checkpoint)
            _say(world, f"{run_dir}: continuing at step {checkpoint.step} of {total}")
        with _tracked(config, run_dir, world, clip, index, total) as tracker:
            step = _train(config, run_dir, world, control, clip, checkpoint, tracker, index, total, watch, lease)
    return Outcome(run_dir, step, total)


def _leave_mark() -> None:
    """Tell the launch script, which torchrun gives no exit code, that the run was stopped before its end."""
    if "SELORA_STOPPED" in os.environ:
        Path(os.environ["SELORA_STOPPED"]).touch()


def _check_data(checkpoint: Checkpoint, index: ShardIndex) -> None:
    """The position of a run is a number; it means the same samples only in the same shards."""
    trained = checkpoint.state["data_digest"]
    if trained != index.digest:
        raise ConfigError(
            f"{checkpoint.path}: was trained on shards {trained[:12]}, but data.train={index.folder.location} "
            f"now holds {index.digest[:12]}: put the old shards back, or start a run under another name"
        )


def warnings_of(config: Config, total: int) -> list[str]:
    """Settings that are legal and yet cannot do what they say in a run of `total` steps."""
    found = []
    if config.train.warmup_steps >= total:
        found.append(f"train.warmup_steps={config.train.warmup_steps} outlasts the run's {total} steps")
    if config.gated:
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
    config: Config,
    run_dir: Path,
    world: World,
    control: dist.ProcessGroup,
    clip: Clip,
    checkpoint: Checkpoint | None,
    tracker: Tracker,
    index: ShardIndex,
    total: int,
    watch: Watch | None,
    lease: Lease | None,
) -> int:
    model, settings = clip.model, config.train
    rates = Rates(settings.lr, settings.rest_lr or settings.lr, config.gate.lr or settings.lr)
    groups = parameter_groups(trainable(model), inside_layers, rates, settings.weight_decay)
    gradients = GradientWatch(model)
    engine = build_engine(_objective(config, clip), groups, config, world)
    named = trainable(model)
    start = 0
    if checkpoint is not None:
        restore_moments(engine, named, checkpoint.moments())
        start = checkpoint.step
    sink = tracker if watch is None else _Watched(tracker, watch)
    monitor = _monitor(config, clip, world, control, sink, index, total)
    batches = _batches(config, clip, index, world, start, total)

    def save(done: int) -> None:
        parameters, moments = full_parameters(named), optimizer_state(engine, named)
        if world.is_main:
            if lease is not None:
                lease.check()
            state = checkpoint_state(config, clip, index.digest, done, world)
            save_checkpoint(run_dir, parameters, moments, state, keep_last=settings.keep_last)
        dist.barrier(control)

    with StopRequest(None if watch is None else watch.stop_requested) as stop:
        try:
            done = train_steps(
                engine,
                batches,
                tokenize=clip.tokenizer,
                factor=lambda step: lr_factor(step, settings.warmup_steps, total),
                peak_lr=settings.lr,
                seed=config.seed,
                gradients=gradients,
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
        _say(world, f"stopped by a signal at step {done} of {total}, saved; the same command continues")
    return done


@dataclass(frozen=True)
class _Watched:
    """The tracker, and the one who watches."""

    tracker: Tracker
    watch: Watch

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.tracker.metrics(step, values)
        self.watch.recorded(step, values)


def _monitor(
    config: Config,
    clip: Clip,
    world: World,
    control: dist.ProcessGroup,
    sink: Sink,
    index: ShardIndex,
    total: int,
) -> Monitor:
    return Monitor(
        world=world,
        control=control,
        sink=sink,
        gates=partial(gate_values, clip.model),
        total_steps=total,
        global_batch_size=config.train.global_batch_size,
        log_every=config.train.log_every,
        gates_every=config.train.gates_every,
        bad_limit=config.data.max_bad_share * index.samples,
    )


def _batches(config: Config, clip: Clip, index: ShardIndex, world: World, start: int, total: int) -> Batches[Batch]:
    data = config.data
    dataset = TrainDataset(
        index,
        size=clip.preprocess_cfg["size"],
        seed=config.seed,
        streams=data.streams,
        window=data.shuffle_window,
        templates=data.templates,
        crop_scale=data.crop_scale,
        preprocessing=data.preprocessing,
        max_pixels=data.max_pixels,
    )
    return train_loader(
        dataset,
        global_batch=config.train.global_batch_size,
        start_step=start,
        stop_step=total,
        rank=world.rank,
        world=world.world_size,
        workers=data.workers,
        pin=world.device.type == "cuda",
    )


def _objective(config: Config, clip: Clip) -> Objective:
    gate = config.gate
    return Objective(
        clip.model,
        [block.gate for block in blocks(clip.model).values() if block.gate is not None],
        PenaltySettings(gate.penalty, gate.reduction, gate.lam, gate.threshold, gate.delay_steps),
        mean=clip.preprocess_cfg["mean"],
        std=clip.preprocess_cfg["std"],
        precision=config.model.precision,
    )


def _claim(run_dir: Path, config: Config, world: World) -> None:
    """Write the resolved config into the run's directory, or refuse a directory that holds another run.

    Rank 0 alone looks and writes; when it refuses, the launcher ends the others.
    """
    if not world.is_main:
        return
    path = run_dir / "config.yaml"
    if path.exists():
        changed = changed_settings(load_config(path, []), config)
        if changed and latest_checkpoint(run_dir) is None:
            _set_aside(run_dir, world)
        elif changed:
            raise ConfigError(
                f"{run_dir} holds a run with other settings; choose another name=… or restore them:\n"
                + "\n".join(changed)
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(to_yaml(config))
    partial_path.replace(path)


def _set_aside(run_dir: Path, world: World) -> None:
    """Nothing was trained here yet, so other settings are a second attempt: the record of the first makes room."""
    number = next(n for n in itertools.count(1) if not run_dir.with_name(f"{run_dir.name}.abandoned-{n}").exists())
    old = run_dir.rename(run_dir.with_name(f"{run_dir.name}.abandoned-{number}"))
    _say(world, f"an attempt with other settings, without a checkpoint, moved to {old}")


@contextmanager
def _tracked(
    config: Config, run_dir: Path, world: World, clip: Clip, index: ShardIndex, total: int
) -> Iterator[Tracker]:
    """A tracker on rank 0 that records how the run ended, whatever ends it; every node's machine is watched, too."""
    tracker: Tracker = NullTracker()
    every, watcher = config.tracking.machine_every_s, None
    if world.is_main:
        tracker = open_tracker(
            run_dir,
            run_name=config.name,
            uri=config.tracking.uri,
            experiment=config.tracking.experiment,
            enabled=config.tracking.enabled,
            system_metrics=None if every is None else (world.host, every),
        )
    elif every is not None and world.local_rank == 0:
        watcher = watch_machine(run_dir, world.host, every)
    tracker.params(flatten(config))
    tracker.tags({"selora.base_digest": clip.digest, "selora.data_digest": index.digest, **environment_tags()})
    status = "FAILED"
    try:
        yield tracker
        reached = latest_checkpoint(run_dir)
        status = "FINISHED" if reached is not None and reached.step >= total else "KILLED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if world.is_main:
            _record_artifacts(tracker, run_dir)
        if watcher is not None:
            watcher.finish(_WATCHER_SECONDS)
        tracker.finish(status)


def _record_artifacts(tracker: Tracker, run_dir: Path) -> None:
    tracker.artifact(run_dir / "config.yaml")
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is not None:
        gates = run_dir / "gate_map.json"
        gates.write_text(json.dumps(checkpoint.state["gate_map"], indent=1))
        tracker.artifact(gates)


def _say(world: World, text: str) -> None:
    if world.is_main:
        sys.stderr.write(text + "\n")
