"""How many parameters of each trial train, and so how large its checkpoints are, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.config import Config, ConfigError
from pipeline.tuning.grid import Trial

if TYPE_CHECKING:
    from pipeline.model.load import Model


# fp32 weights and moments of the trained parameters: two moments for Adam, one for SGD.
_BYTES_PER_PARAMETER = {"adamw": 12, "sgd": 8}


def checkpoint_bytes(trials: Sequence[Trial], parameters: Mapping[str, int]) -> int:
    """Most bytes that the checkpoints of all trials take; while one is written there is one more than is kept."""
    settings = ((parameters[one.name], one.config.train) for one in trials)
    return sum(count * _BYTES_PER_PARAMETER[train.optimizer] * (train.keep_last + 1) for count, train in settings)


def trained_parameters(trials: Sequence[Trial]) -> dict[str, int]:
    """{trial: number of trained parameters}. Builds each base model once, with random weights if it is named.

    Without a ViT's classifier, whose size the shards decide.
    """
    from pipeline.model.load import load_model
    from pipeline.model.vit import untagged

    bases: dict[str, Model] = {}
    found = {}
    for trial in trials:
        name = trial.config.model.name
        if name not in bases:
            bases[name] = load_model(untagged(name))
        found[trial.name] = _count(bases[name], trial.config)
    return found


def _count(clip: Model, config: Config) -> int:
    """r (inputs + outputs) per block, 1 per gate, `outputs` for DoRA's magnitude, and other trained parameters."""
    from pipeline.costs.cost import trained_parameters as beside_blocks
    from pipeline.method.adapter import random_targets, select_targets
    from pipeline.model.towers import adapter_targets

    adapter = config.adapter
    total = beside_blocks(clip, config.train.train_rest, adapter.kind)
    if adapter.kind in ("full", "none"):
        return total
    targets = adapter_targets(clip.model)
    try:
        names = select_targets(list(targets), adapter.towers, adapter.projections, adapter.targets)
    except ValueError as error:
        raise ConfigError(f"{config.name}: adapter.{error}") from error
    if adapter.random_k is not None:
        names = random_targets(names, adapter.random_k, config.seed)
    for name in names:
        module, attribute = targets[name]
        linear = getattr(module, attribute)
        total += adapter.rank * (linear.in_features + linear.out_features) + config.gated
        total += linear.out_features if adapter.kind == "dora" else 0
    return total
