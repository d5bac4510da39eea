"""How much of each trial's model trains, and so how large its checkpoints are, without training any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.config import Config, ConfigError
from pipeline.tuning.grid import Trial

if TYPE_CHECKING:
    from pipeline.model.load import Model


# fp32 weights and the moments of what trains: two of Adam's, one of SGD's.
_BYTES_PER_PARAMETER = {"adamw": 12, "sgd": 8}


def checkpoint_bytes(trials: Sequence[Trial], parameters: Mapping[str, int]) -> int:
    """Disk that the checkpoints of all trials take at most; one more than is kept lies there while it is written."""
    settings = ((parameters[one.name], one.config.train) for one in trials)
    return sum(count * _BYTES_PER_PARAMETER[train.optimizer] * (train.keep_last + 1) for count, train in settings)


def trained_parameters(trials: Sequence[Trial]) -> dict[str, int]:
    """{trial: trained parameters}. Builds each base model once, with random weights where it has a name of its own.

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
    """r (inputs + outputs) for each block, 1 for its gate, `outputs` for DoRA's magnitude, and the rest that trains."""
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
