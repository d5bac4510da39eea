"""A run directory: its config, its checkpoints and its other files.

OUT/NAME/config.yaml                                the resolved config
OUT/NAME/checkpoints/latest                         name of the newest complete checkpoint
OUT/NAME/checkpoints/step-00000200/state.json       step, base, adapter, gates, versions; tensors are next to it
OUT/NAME/base.json                                  where the base is now, if it has moved
OUT/NAME/gate_map.json                              gates at the end of the training
OUT/NAME/eval/summary.json                          results (results.py)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError, to_yaml
from pipeline.files import read_json, replace_json, replace_text
from pipeline.runs.formats import Format

CONFIG_FILE, GATES_FILE, STATE_FILE = "config.yaml", "gate_map.json", "state.json"
BASE_FILE = "base.json"
CHECKPOINTS, LATEST = "checkpoints", "latest"
STATE = Format("selora-checkpoint", 1, ("step",))
BASE = Format("selora-base", 1, ("name", "pretrained"))


@dataclass(frozen=True)
class StoredCheckpoint:
    """One complete checkpoint: its directory and the content of its state.json."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps finished."""
        return int(self.state["step"])


def is_run(directory: str | Path) -> bool:
    """Whether this is a run directory; it may still lack a checkpoint."""
    return (Path(directory) / CONFIG_FILE).is_file()


def write_config(run_dir: Path, config: Config) -> Path:
    """Write the resolved config, without passwords."""
    path = run_dir / CONFIG_FILE
    replace_text(path, to_yaml(config))
    return path


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Directory of the checkpoint of a step."""
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def kept_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, in rising order."""
    found = (run_dir / CHECKPOINTS).glob(f"step-*/{STATE_FILE}")
    return sorted(int(file.parent.name.removeprefix("step-")) for file in found)


def latest_step(run_dir: Path) -> int | None:
    """The step that `latest` names; None before the first checkpoint."""
    pointer = run_dir / CHECKPOINTS / LATEST
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    number = name.removeprefix("step-")
    if not number.isdigit():
        raise ConfigError(f"{pointer}: names {name!r}, which is not a checkpoint: restore it or remove `{LATEST}`")
    return int(number)


def read_checkpoint(run_dir: Path, step: int) -> StoredCheckpoint:
    """The checkpoint of a step.

    Raises:
        FileNotFoundError: there is no complete checkpoint at this step.
        ConfigError: its state.json is damaged, or of a later version.
    """
    path = checkpoint_dir(run_dir, step)
    return StoredCheckpoint(path, STATE.read(path / STATE_FILE))


def latest_checkpoint(run_dir: Path) -> StoredCheckpoint | None:
    """The newest checkpoint; None before the first one.

    Raises:
        ConfigError: `latest` names a checkpoint that is missing or incomplete.
    """
    step = latest_step(run_dir)
    if step is None:
        return None
    try:
        return read_checkpoint(run_dir, step)
    except FileNotFoundError:
        name, pointer = checkpoint_dir(run_dir, step).name, run_dir / CHECKPOINTS / LATEST
        raise ConfigError(
            f"{pointer} names {name}, which is missing or incomplete: restore it or remove `{LATEST}`"
        ) from None


def read_base(run_dir: Path) -> dict[str, str | None]:
    """{"name", "pretrained"}: where the base of a run has moved to; {} if no move was recorded."""
    try:
        found = BASE.read(run_dir / BASE_FILE)
    except FileNotFoundError:
        return {}
    return {key: found[key] for key in BASE.keys}


def write_base(run_dir: Path, name: str, pretrained: str | None) -> None:
    """Record where the base of a run is now."""
    BASE.write(run_dir / BASE_FILE, {"name": name, "pretrained": pretrained})


def steps_done(run_dir: Path) -> int:
    """Steps in the newest checkpoint; 0 before the first one."""
    return latest_step(run_dir) or 0


def readable_steps(run_dir: Path) -> int:
    """The same for the record of a failure, which may be that the checkpoints cannot be read: 0 then."""
    try:
        return steps_done(run_dir)
    except (ConfigError, OSError):
        return 0


def point_to(run_dir: Path, step: int) -> None:
    """Make a complete checkpoint the newest."""
    replace_text(run_dir / CHECKPOINTS / LATEST, checkpoint_dir(run_dir, step).name + "\n")


def write_gates(run_dir: Path, gates: Mapping[str, Any] | None) -> Path:
    """Write gate_map.json: {target: {score, open, ..}}, empty without gates."""
    path = run_dir / GATES_FILE
    replace_json(path, gates or {})
    return path


def read_gates(run_dir: Path, step: int | None = None) -> dict[str, bool]:
    """{target: whether its block is open}, at the checkpoint of `step`, or now; {} without gates.

    gate_map.json is written when a training ends; before that, the newest checkpoint holds the gates.
    """
    if step is not None and (checkpoint_dir(run_dir, step) / STATE_FILE).is_file():
        gates = read_checkpoint(run_dir, step).state.get("gate_map")
    elif (run_dir / GATES_FILE).is_file():
        try:
            gates = read_json(run_dir / GATES_FILE)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    else:
        gates = _newest_gates(run_dir)
    return open_gates(gates or {})


def _newest_gates(run_dir: Path) -> Mapping[str, Any] | None:
    newest = latest_step(run_dir)
    try:
        return None if newest is None else read_checkpoint(run_dir, newest).state.get("gate_map")
    except FileNotFoundError:  # replaced since by a training that is still running
        return None


def open_gates(gates: Mapping[str, Any]) -> dict[str, bool]:
    """{target: whether its block is open} from the content of gate_map.json."""
    return {target: bool(gate["open"]) for target, gate in gates.items()}


def acting_parameters(run_dir: Path) -> int | None:
    """Number of trained parameters in the newest checkpoint, closed blocks excluded; None without a checkpoint."""
    from safetensors import SafetensorError, safe_open

    try:
        newest = latest_checkpoint(run_dir)
        if newest is None:
            return None
        threshold = (newest.state.get("adapter") or {}).get("threshold") or 0.0
        with safe_open(newest.path / "trainable.safetensors", framework="numpy") as file:
            names = list(file.keys())
            scores = [name for name in names if name.endswith("gate.score")]
            closed = [name for name in scores if float(file.get_tensor(name)[0]) < threshold]
            idle = tuple(name.removesuffix("gate.score") for name in closed)
            acting = [name for name in names if not (idle and name.startswith(idle))]
            return sum(math.prod(file.get_slice(name).get_shape()) for name in acting)
    except (ConfigError, OSError, SafetensorError):  # replaced since by a training that is still running
        return None
