"""The options that differ between two calls for one run, and the number of its steps; does not import torch."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from pathlib import Path

from pipeline.config import VIT_SCHEMA, Config, affects_result, flatten

# With fewer images per rank, an eager step on a GPU is bound by kernel launches.
COMPILED_BELOW = 256


def changed_settings(old: Config, new: Config) -> list[str]:
    """A line `  key: old -> new` for each changed option that affects the result and so forbids to continue the run."""
    before, after = flatten(old), flatten(new)
    before |= {key: after[key] for key in ("model.name", "model.pretrained") if _same_base(before.get(key), after[key])}
    return [
        f"  {key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and affects_result(key)
    ]


def _same_base(old: object, new: object) -> bool:
    """Whether two paths are the same place, or the old one is gone: the digest is compared before a run continues."""
    places = []
    for each in (old, new):
        plain = str(each or "").removeprefix(VIT_SCHEMA)
        if not plain.startswith("local-dir:") and not Path(plain).is_absolute():
            return False
        places.append(Path(plain.removeprefix("local-dir:")).absolute())
    return places[0] == places[1] or not places[0].exists()


def total_steps(config: Config, samples: int) -> int:
    """train.steps, or the number of steps that shows every sample train.epochs times."""
    return config.train.steps or math.ceil(config.train.epochs * samples / config.train.global_batch_size)


def compiles(config: Config, world_size: int, device: str) -> tuple[bool, str]:
    """Whether the layers of this run are compiled and, if `train.compile` leaves it open, the reason in words.

    Args:
        world_size: number of ranks, which share the batch.
        device: "cuda" or "cpu".
    """
    train, images = config.train, config.train.global_batch_size // world_size
    if train.compile != "auto":
        return train.compile, ""
    if device != "cuda":
        return False, "on a CPU eager layers are as fast"
    if images >= COMPILED_BELOW:
        return False, f"{images} images per rank keep a GPU busy"
    if train.zero_stage == 3 and (train.micro_batch_size or train.activation_checkpointing):
        return False, "it does not go with recomputation under train.zero_stage=3"
    if missing := _missing_to_compile():
        return False, f"{missing} is missing, and {images} images per rank would be faster with it"
    return True, f"{images} images per rank, fewer than {COMPILED_BELOW}"


def _missing_to_compile() -> str:
    """Requirements of torch.compile for a GPU that are missing here."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    return "" if any(name and shutil.which(name) for name in compilers) else "a C compiler (gcc)"
