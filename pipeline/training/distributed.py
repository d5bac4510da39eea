"""Who this process is among all ranks, read once from the launcher's environment."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.config import ConfigError

TIMEOUT = timedelta(minutes=30)
# glibc's malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX.
_HEAP_SETTINGS = {-1: 2**31 - 1, -2: 64 * 2**20, -4: 0}


@dataclass(frozen=True)
class World:
    """One process among `world_size`; `local_rank` numbers the processes of one host."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_world(env: Mapping[str, str] | None = None) -> World:
    """Read torchrun's, DeepSpeed's or Ray's variables; without any of them this is a world of one.

    Raises ConfigError when only a part of RANK, WORLD_SIZE, LOCAL_RANK is set: half a launcher would hang later.
    """
    env = os.environ if env is None else env
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: env[name] for name in names if name in env}
    if given and len(given) < len(names):
        missing = ", ".join(name for name in names if name not in given)
        raise ConfigError(
            f"the launcher set {', '.join(given)} but not {missing}: start with torchrun, deepspeed, or none at all"
        )
    rank, size, local = (int(given.get(name, default)) for name, default in zip(names, ("0", "1", "0"), strict=True))
    local_size = int(env.get("LOCAL_WORLD_SIZE", size))
    return World(rank, size, local, local_size, _device(local))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Ray hides the other cards from a worker, so its one visible card is number 0 whatever the local rank is.
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def share_threads(world: World) -> None:
    """Split this host's cores over its ranks unless OMP_NUM_THREADS says otherwise; unset it makes ranks fight."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    threads = max(1, len(os.sched_getaffinity(0)) // world.local_world_size)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def keep_heap(world: World) -> None:
    """On a CPU, keep freed memory in the process: glibc hands big buffers back to the kernel after every operation.

    Each next operation then pays for fresh pages. On 2 cores a small CLIP trains twice as fast with this.
    """
    if world.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl
        return
    for parameter, value in _HEAP_SETTINGS.items():
        libc.mallopt(parameter, value)


def any_rank(flag: bool, group: dist.ProcessGroup) -> bool:
    """True on every rank when `flag` is true on one; `group` is the gloo control group, so no device waits."""
    value = torch.tensor([int(flag)])
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return bool(value.item())


def gather_numbers(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate equally long 1-D CPU tensors of all ranks, in rank order."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.cat(parts)
