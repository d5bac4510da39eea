"""The uniform mean of several fine-tuned models (arXiv 2203.05482, "uniform soup").

Merged weights are averaged, so the mean is exact for LoRA, DoRA and full fine-tuning alike; the mean of B times the
mean of A would not be the mean of B A.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.model.restore import find_run, load_run


@torch.no_grad()
def mean_weights(run_dirs: Sequence[Path]) -> dict[str, Tensor]:
    """{parameter: mean over the merged models, fp32}; the sum is taken in fp64. One model is in memory at a time."""
    total: dict[str, Tensor] = {}
    for run_dir in run_dirs:
        for name, value in load_run(run_dir).model.named_parameters():
            total[name] = total[name] + value.double() if name in total else value.double()
    return {name: (value / len(run_dirs)).float().contiguous() for name, value in total.items()}


def state_of_mean(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """The state.json of a checkpoint with the mean of several runs, which is stored as a full fine-tuning.

    Raises:
        ConfigError: the runs started from different weights, or one cannot be read.
    """
    sources = [find_run(run_dir) for run_dir in run_dirs]
    bases = {source.base_digest: source.label for source in sources}
    if len(bases) > 1:
        one, other = list(bases.values())[:2]
        raise ConfigError(f"soup: {one} and {other} started from different weights; train from a pretrained model")
    state = {key: value for key, value in sources[0].state.items() if key not in ("settling", "budget")}
    whole = {"kind": "full", "rank": 0, "alpha": None, "targets": [], "gated": False, "threshold": 0.0}
    return state | {"step": max(source.step for source in sources), "adapter": whole, "gate_map": {}}
