"""The training processes of one trial on a Ray cluster: placed together, started as a launcher does, ended together."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.tuning.cluster.forked import run_forked
from pipeline.tuning.cluster.ray_errors import Died, RanksFailed

_LOOK_SECONDS = 1.0
_TEARDOWN_SECONDS = 10.0


@dataclass(frozen=True)
class Size:
    """How many processes there are, and what each of them reserves."""

    workers: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Slot:
    """Where a process of Ray is: its node, the node's address, a port that is free there, and the cards it may use."""

    node: str
    address: str
    port: int
    cards: tuple[str, ...]


def run_ranks(
    function: Callable[..., object],
    arguments: tuple[Any, ...],
    size: Size,
    folder: Path,
    *,
    tick: Callable[[], None],
    stopped: Callable[[], bool],
) -> None:
    """Call a function of a module on every rank, with the variables of torchrun, and wait until all have ended.

    Args:
        folder: the working directory, on every node.
        tick: called every second meanwhile.
        stopped: whether waiting for room on the cluster should end; then nothing is started.

    Raises:
        RanksFailed: some processes failed; the others have been ended.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    each = {"CPU": size.cpus} | ({"GPU": size.gpus} if size.gpus else {})
    group = placement_group([each] * size.workers, strategy="PACK")

    def on(bundle: int, task: Callable[..., Any]) -> Any:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        # Ray ends a process that uses a card after one call by default, and the server of ranks with it.
        wrapped = ray.remote(num_cpus=size.cpus, num_gpus=size.gpus, max_calls=0, max_retries=0)(task)
        return wrapped.options(scheduling_strategy=strategy)

    try:
        while not group.wait(_LOOK_SECONDS):
            if stopped():
                return
        try:
            slots = ray.get([on(bundle, _slot).remote() for bundle in range(size.workers)])
        except RayError as error:
            raise RanksFailed({0: error}) from error
        bundles = in_rank_order(slots)
        variables = variables_of([slots[bundle] for bundle in bundles])
        tasks = {
            on(bundle, _rank).remote(function, arguments, variables[rank], folder): rank
            for rank, bundle in enumerate(bundles)
        }
        _wait(tasks, tick)
    finally:
        remove_placement_group(group)


def run_alone(
    function: Callable[..., object], arguments: tuple[Any, ...], size: Size, folder: Path, retries: int
) -> None:
    """Call a function of a module in a separate process on the cluster, and again if the process is killed."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    remote = ray.remote(
        num_cpus=size.cpus,
        num_gpus=size.gpus,
        max_calls=0,
        max_retries=retries,
        retry_exceptions=[Died],  # type: ignore[arg-type]
        # Otherwise it would have to fit into the small share of the trial's own process.
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),  # type: ignore[arg-type]
    )
    ray.get(remote(_rank).remote(function, arguments, {}, folder))


def in_rank_order(slots: Sequence[Slot]) -> list[int]:
    """Positions in `slots` so that those of one node follow each other, the first node first."""
    nodes = list(dict.fromkeys(slot.node for slot in slots))
    return sorted(range(len(slots)), key=lambda position: (nodes.index(slots[position].node), position))


def variables_of(slots: Sequence[Slot]) -> list[dict[str, str]]:
    """What torchrun would set for each rank; `slots` are in rank order.

    All ranks of a node see the cards of all of them, because NCCL looks for its neighbours' cards.
    """
    found, first = [], slots[0]
    for rank, slot in enumerate(slots):
        here = [number for number, other in enumerate(slots) if other.node == slot.node]
        variables = {
            "RANK": rank,
            "WORLD_SIZE": len(slots),
            "LOCAL_RANK": here.index(rank),
            "LOCAL_WORLD_SIZE": len(here),
            "MASTER_ADDR": first.address,
            "MASTER_PORT": first.port,
        }
        cards = sorted({card for number in here for card in slots[number].cards})
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(cards)} if cards else {}
        found.append({name: str(value) for name, value in variables.items()} | visible)
    return found


def _wait(tasks: Mapping[Any, int], tick: Callable[[], None]) -> None:
    """Wait for all tasks; after a failure give the others a moment to say what they met, and end them."""
    import ray

    left, failures = list(tasks), {}
    while left and not failures:
        done, left = ray.wait(left, timeout=_LOOK_SECONDS)
        tick()
        failures |= _failures(tasks, done)
    if not failures:
        return
    if left:
        done, left = ray.wait(left, num_returns=len(left), timeout=_TEARDOWN_SECONDS)
        failures |= _failures(tasks, done)
    for task in left:
        ray.cancel(task)
    if left:
        ray.wait(left, num_returns=len(left), timeout=_TEARDOWN_SECONDS)
    raise RanksFailed(failures)


def _failures(tasks: Mapping[Any, int], done: Sequence[Any]) -> dict[int, BaseException]:
    import ray

    found: dict[int, BaseException] = {}
    for task in done:
        try:
            ray.get(task)
        except Exception as error:  # noqa: BLE001 - of whatever kind, it ends the ranks
            found[tasks[task]] = error
    return found


def _slot() -> Slot:
    import ray

    context = ray.get_runtime_context()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    cards = tuple(map(str, context.get_accelerator_ids().get("GPU", ())))
    return Slot(context.get_node_id(), ray.util.get_node_ip_address(), port, cards)


def _rank(
    function: Callable[..., object], arguments: tuple[Any, ...], variables: Mapping[str, str], folder: Path
) -> None:
    """In a process of Ray: a process of its own for the function, with relative paths from where the command began."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}: {error.strerror} on {os.uname().nodename}; start the sweep in a directory that all nodes share"
        ) from None
    run_forked(function, arguments, os.environ | variables)
