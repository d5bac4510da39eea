"""The rank of this process and the number of ranks, read once from the launcher's environment."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.config import ConfigError
from pipeline.training.cluster.cards import Device, choose_device

TIMEOUT = timedelta(minutes=30)
_LOG_HANDLER = "selora-rank"
# glibc's malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_MAX to keep freed memory, M_MMAP_THRESHOLD to return it.
_KEEP_HEAP = {-1: 2**31 - 1, -2: 64 * 2**20, -4: 0}
_RETURN_HEAP = {-3: 2**17}


@dataclass(frozen=True)
class Launcher:
    """The variables by which one kind of launcher sets the rank of a process."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: tuple[str, ...]


# torchrun, deepspeed and the ranks of a sweep have the same variables; the others are read where these are missing.
_COMMON = Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
_DIRECT = (
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ("SLURM_STEP_TASKS_PER_NODE",)),
    Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
)


@dataclass(frozen=True)
class World:
    """One process among `world_size`; `local_rank` numbers the processes of one host."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    host: str = field(default_factory=lambda: os.uname().nodename)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_world(env: Mapping[str, str] | None = None, device: Device = "auto") -> World:
    """Read the variables of torchrun, deepspeed, Ray, srun or mpirun; without any of them this is a world of one.

    Args:
        env: variables; None: those of this process.
        device: what to train on (`choose_device`).

    Raises:
        ConfigError: launchers clash, a launcher's variables are only partly set (it would hang later), or the device
            does not exist.
    """
    env = os.environ if env is None else env
    launcher = _launcher(env)
    if launcher is None:
        return World(0, 1, 0, 1, choose_device(0, device))
    try:
        rank, size, local = (int(env[name]) for name in (launcher.rank, launcher.size, launcher.local_rank))
        # Slurm writes 4(x2),3 for two nodes of four tasks and one of three.
        given = next((env[name] for name in launcher.local_size if name in env), str(size))
        local_size = int(re.split(r"[(,]", given)[0])
    except ValueError as error:
        raise ConfigError(f"{launcher.name} set a variable that should be a number: {error}") from None
    if not 0 <= rank < size:
        raise ConfigError(f"{launcher.rank}={rank} is not below {launcher.size}={size}: two launchers at once?")
    return World(rank, size, local, local_size, choose_device(local, device))


def _launcher(env: Mapping[str, str]) -> Launcher | None:
    names = (_COMMON.rank, _COMMON.size, _COMMON.local_rank)
    given = [name for name in names if name in env]
    if given:
        missing = ", ".join(name for name in names if name not in env)
        if missing:
            raise ConfigError(
                f"the launcher set {', '.join(given)} but not {missing}: start with torchrun, deepspeed, or none at all"
            )
        _refuse_nested(env)
        return _COMMON
    # SLURM_STEP_NUM_TASKS: a batch script of many tasks also has a SLURM_PROCID, but is a single process.
    found = [each for each in _DIRECT if int(env.get(each.size, "1")) > 1 and each.rank in env]
    if found and not ("MASTER_ADDR" in env and "MASTER_PORT" in env):
        raise ConfigError(
            f"{found[0].name} started {env[found[0].size]} tasks, but MASTER_ADDR and MASTER_PORT do not say where "
            f"rank 0 is: set them, or start torchrun in one task per node as launch/slurm/train.sbatch does"
        )
    return found[0] if found else None


def _refuse_nested(env: Mapping[str, str]) -> None:
    """Refuse torchrun in every task of `srun --ntasks-per-node=8`, which would start 64 ranks per node."""
    tasks, nodes = int(env.get("SLURM_STEP_NUM_TASKS", "1")), int(env.get("SLURM_STEP_NUM_NODES", "1"))
    if "TORCHELASTIC_RUN_ID" in env and tasks > nodes:
        raise ConfigError(
            f"srun started {tasks} tasks on {nodes} nodes and each of them torchrun: use --ntasks-per-node=1 with "
            f"torchrun, or no torchrun"
        )


def share_threads(world: World) -> None:
    """Divide this host's cores among its ranks unless OMP_NUM_THREADS is set; otherwise ranks compete for them."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    threads = max(1, len(os.sched_getaffinity(0)) // world.local_world_size)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def set_heap(world: World, *, keep: bool) -> None:
    """On a CPU, say what becomes of freed memory: glibc's malloc returns it, or not, by a threshold that moves.

    keep: the process keeps all of it. Otherwise each operation pays for new pages; on 2 cores a small CLIP trains twice
    as fast with this. If False, buffers from 128 kB on return to the kernel at once, as glibc begins and then no longer
    does: under ZeRO-3 the layers that are gathered and freed otherwise leave holes, 2.9 GB between the steps of a rank
    that needs 0.9 (a base of 1 GB, two ranks).
    """
    if world.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl
        return
    for parameter, value in (_KEEP_HEAP if keep else _RETURN_HEAP).items():
        libc.mallopt(parameter, value)


def label_logs(world: World, run: str) -> None:
    """Begin every log line with the time, the run (SWEEP/TRIAL in a sweep), the rank and the host."""
    log = logging.getLogger("selora")
    log.propagate = False  # a library's logging.basicConfig would print every line a second time
    for handler in [each for each in log.handlers if each.name == _LOG_HANDLER]:
        log.removeHandler(handler)
    handler = logging.StreamHandler()
    handler.name = _LOG_HANDLER
    text = f"%(asctime)s %(levelname)s [{run} rank {world.rank} on {world.host}] %(message)s"
    handler.setFormatter(logging.Formatter(text))
    log.addHandler(handler)


class AnyRank:
    """Whether a flag is true on any rank; the answer arrives one call later, so no rank waits for the slowest one.

    Args:
        group: the gloo control group; no device takes part.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None

    def ask(self, flag: bool) -> None:
        """Send this rank's flag; call it equally often on every rank."""
        value = torch.tensor([int(flag)])
        work = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = value, work

    def answer(self) -> bool:
        """True on every rank if the last flag of any rank was true; False before the first one."""
        if self._pending is None:
            return False
        value, work = self._pending
        if work is not None:
            work.wait()
        self._pending = None
        return bool(value.item())


def gather_numbers(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate equally long 1-D CPU tensors of all ranks, in rank order."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.cat(parts)
