"""The blocks of a run as text: which are active and, with a budget, when each of the others was dropped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.runs.run import latest_checkpoint, open_gates


def read_budget(run_dir: Path) -> dict[str, Any] | None:
    """The budget's state in the newest checkpoint: `usefulness`, `open` and `dropped_at`; None without a budget."""
    try:
        newest = latest_checkpoint(run_dir)
    except ConfigError:  # replaced since by a training that is still running
        return None
    return None if newest is None else newest.state.get("budget")


def describe_blocks(run_dir: Path) -> str:
    """A map of the blocks, layer by projection; with a budget also a line for each block, the most useful first.

    Raises:
        ConfigError: the run has no checkpoint or no blocks.
    """
    newest = latest_checkpoint(run_dir)
    if newest is None:
        raise ConfigError(f"{run_dir} has no checkpoint yet: train it first")
    gates = open_gates(newest.state.get("gate_map") or {})
    if not gates:
        raise ConfigError(f"{run_dir} has no blocks: its adapter.kind is {newest.state['adapter']['kind']}")
    lines = [f"{run_dir}, step {newest.step}: {sum(gates.values())} of {len(gates)} blocks are active"]
    for tower in dict.fromkeys(target.partition(".")[0] for target in gates):
        lines += _tower(tower, gates)
    if (budget := newest.state.get("budget")) is not None:
        lines += _by_usefulness(budget)
    return "\n".join(lines)


def _tower(tower: str, gates: Mapping[str, bool]) -> list[str]:
    """A row for each projection, a column for each layer: # active, . closed."""
    own = {tuple(target.split(".")[1:]): is_open for target, is_open in gates.items() if target.startswith(f"{tower}.")}
    layers = sorted({int(layer) for layer, _ in own})
    projections = dict.fromkeys(projection for _, projection in own)
    width = max(len(name) for name in (tower, *projections))
    lines = ["", "  ".join([tower.ljust(width), *(str(layer).rjust(2) for layer in layers)])]
    for name in projections:
        signs = [{True: "#", False: ".", None: " "}[own.get((str(layer), name))] for layer in layers]
        lines.append("  ".join([name.ljust(width), *(sign.rjust(2) for sign in signs)]))
    return lines


def _by_usefulness(budget: Mapping[str, Any]) -> list[str]:
    """Usefulness of each block and the step at which it was dropped; open blocks have no such step."""
    lines = ["", f"{'usefulness':>12}  {'dropped at':>10}  block"]
    ranked = sorted(budget["usefulness"].items(), key=lambda item: (-item[1], item[0]))
    return lines + [
        f"{value:12.3e}  {'active' if name in budget['open'] else budget['dropped_at'].get(name, ''):>10}  {name}"
        for name, value in ranked
    ]
