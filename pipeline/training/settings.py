"""What of a run's config decides its result, and how long the run is: known without torch, for plans and sweeps."""

from __future__ import annotations

import math

from pipeline.config import Config, flatten

# Settings a run may change between two calls of the same command: they do not touch what is computed.
FREE_SETTINGS = (
    "tracking.",
    "promote.",
    "eval.",
    "data.workers",
    "data.read_ahead",
    "train.zero_stage",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.compile",
    "train.log_every",
    "train.gates_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.timeout_s",
    "out",
    "name",
)


def changed_settings(old: Config, new: Config) -> list[str]:
    """`  key: old -> new` of every option that differs and decides the result."""
    before, after = flatten(old), flatten(new)
    return [
        f"  {key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(FREE_SETTINGS)
    ]


def total_steps(config: Config, samples: int) -> int:
    """train.steps, or as many steps as show every sample train.epochs times."""
    return config.train.steps or math.ceil(config.train.epochs * samples / config.train.global_batch_size)
