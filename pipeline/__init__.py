"""selora: selective low-rank adaptation of CLIP, as a distributed pipeline.

The names below are the public Python API. Each is imported on first use, so `import pipeline` loads neither torch nor
any other library.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # typing and what it imports take longer than the rest of this module
if TYPE_CHECKING:
    from typing import Any

    from pipeline.config import Config, ConfigError, load_config
    from pipeline.evaluation.command import evaluate_model as evaluate
    from pipeline.method.adapter import attach_adapter, gate_map, gate_scores, merge_adapter
    from pipeline.method.contrastive import flyp_loss
    from pipeline.method.penalty import gate_penalty
    from pipeline.method.sigmoid import sigmoid_loss
    from pipeline.model.load import load_model
    from pipeline.model.restore import load_run
    from pipeline.model.towers import adapter_targets
    from pipeline.training.run import train

# Public name -> its module, and after a colon the name that it has there if it is another one.
_HOMES = {
    "Config": "pipeline.config",
    "ConfigError": "pipeline.config",
    "adapter_targets": "pipeline.model.towers",
    "attach_adapter": "pipeline.method.adapter",
    "evaluate": "pipeline.evaluation.command:evaluate_model",
    "flyp_loss": "pipeline.method.contrastive",
    "gate_map": "pipeline.method.adapter",
    "gate_penalty": "pipeline.method.penalty",
    "gate_scores": "pipeline.method.adapter",
    "load_config": "pipeline.config",
    "load_model": "pipeline.model.load",
    "load_run": "pipeline.model.restore",
    "merge_adapter": "pipeline.method.adapter",
    "sigmoid_loss": "pipeline.method.sigmoid",
    "train": "pipeline.training.run",
}

__all__ = [
    "Config",
    "ConfigError",
    "adapter_targets",
    "attach_adapter",
    "evaluate",
    "flyp_loss",
    "gate_map",
    "gate_penalty",
    "gate_scores",
    "load_config",
    "load_model",
    "load_run",
    "merge_adapter",
    "sigmoid_loss",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
