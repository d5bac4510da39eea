"""The directory of a run: claimed for one config, registered with the tracker, and marked at the end of the run."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import Config, ConfigError, flatten, load_config
from pipeline.runs.run import CONFIG_FILE, is_run, write_config, write_gates
from pipeline.tracking.tracker import NullTracker, Tracker, environment_tags, open_tracker, watch_machine
from pipeline.training.checkpoint import latest_checkpoint
from pipeline.training.cluster.distributed import World
from pipeline.training.settings import changed_settings

_WATCHER_SECONDS = 10.0  # seconds for a node's last system metrics


def claim(run_dir: Path, config: Config, world: World) -> None:
    """Write the resolved config into the run's directory, or refuse a directory that holds another run.

    Only rank 0 reads and writes; if it refuses, the launcher ends the others.
    """
    if not world.is_main:
        return
    if is_run(run_dir):
        changed = changed_settings(load_config(run_dir / CONFIG_FILE, []), config)
        if changed and latest_checkpoint(run_dir) is None:
            _set_aside(run_dir, world)
        elif changed:
            raise ConfigError(
                f"{run_dir} holds a run with other settings; choose another name=… or restore them:\n"
                + "\n".join(changed)
            )
    write_config(run_dir, config)


def _set_aside(run_dir: Path, world: World) -> None:
    """Move aside the record of an attempt with other settings that has not trained anything yet."""
    number = next(n for n in itertools.count(1) if not run_dir.with_name(f"{run_dir.name}.abandoned-{n}").exists())
    old = run_dir.rename(run_dir.with_name(f"{run_dir.name}.abandoned-{number}"))
    say(world, f"an attempt with other settings, without a checkpoint, moved to {old}")


@contextmanager
def tracked(config: Config, run_dir: Path, world: World, digests: dict[str, str], total: int) -> Iterator[Tracker]:
    """A tracker on rank 0 that always records how the run ended; system metrics come from every node."""
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
    tracker.tags({**digests, **environment_tags()})
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
    tracker.artifact(run_dir / CONFIG_FILE)
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is not None:
        tracker.artifact(write_gates(run_dir, checkpoint.state["gate_map"]))


def leave_mark() -> None:
    """Leave a file for the launch script if the run was stopped before its end.

    The rank exits with 130, but torchrun reports 1 for any exit code of a rank.
    """
    if "SELORA_STOPPED" in os.environ:
        Path(os.environ["SELORA_STOPPED"]).touch()


def say(world: World, text: str) -> None:
    """Print a line for the user once, whatever the number of ranks."""
    if world.is_main:
        sys.stderr.write(text + "\n")
