"""Which options differ between two calls for one run, and how many steps the run has; without torch."""

from __future__ import annotations

import math

from pipeline.config import Config, affects_result, flatten


def changed_settings(old: Config, new: Config) -> list[str]:
    """A line `  key: old -> new` for each option that differs and affects the result: a run cannot go on with it."""
    before, after = flatten(old), flatten(new)
    return [
        f"  {key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and affects_result(key)
    ]


def total_steps(config: Config, samples: int) -> int:
    """train.steps, or as many steps as show every sample train.epochs times."""
    return config.train.steps or math.ceil(config.train.epochs * samples / config.train.global_batch_size)
