"""The model of a run: CLIP with its blocks, what trains in it, and what a checkpoint says about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.config import Config, ConfigError
from pipeline.method.adapter import attach_adapter, blocks, gate_map, gate_scores, random_targets, select_targets
from pipeline.method.settle import Settling
from pipeline.model.clip import Clip, load_clip
from pipeline.model.restore import check_base, copy_parameters
from pipeline.model.towers import TOWERS, adapter_targets, apply_trainable, compile_layers, layers
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.distributed import World
from pipeline.training.objective import Objective, PenaltySettings


def build_model(config: Config) -> Clip:
    """The pretrained CLIP with its blocks attached and only the chosen parameters trainable."""
    clip = load_clip(config.model.name, config.model.pretrained, seed=config.seed)
    adapter, gate = config.adapter, config.gate
    if adapter.kind in ("lora", "dora"):
        targets = adapter_targets(clip.model)
        try:
            names = select_targets(list(targets), adapter.towers, adapter.projections, adapter.targets)
            if adapter.random_k is not None:
                names = random_targets(names, adapter.random_k, config.seed)
            attach_adapter(
                targets,
                rank=adapter.rank,
                kind=adapter.kind,
                alpha=adapter.alpha,
                gated=gate.enabled and adapter.random_k is None,
                gate_init=gate.init,
                threshold=gate.threshold,
                seed=config.seed,
                select=names,
            )
        except ValueError as error:
            raise ConfigError(f"adapter.{error}") from error
    apply_trainable(clip.model, config.train.train_rest, adapter.kind)
    return clip


def objective_of(config: Config, clip: Clip) -> Objective:
    """What the run minimises, computed as section train says: in micro-batches, layers kept or computed again."""
    gate = config.gate
    if config.train.activation_checkpointing:
        clip.model.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
    if config.train.compile:
        compile_layers(clip.model)
    return Objective(
        clip.model,
        [block.gate for block in blocks(clip.model).values() if block.gate is not None],
        PenaltySettings(gate.penalty, gate.reduction, gate.lam, gate.threshold, gate.delay_steps),
        mean=clip.preprocess_cfg["mean"],
        std=clip.preprocess_cfg["std"],
        precision=config.model.precision,
        micro_batch=config.train.micro_batch_size,
    )


def compiled_layers(config: Config, clip: Clip) -> list[type[nn.Module]]:
    """Classes of the layers that are compiled."""
    every = [layer for tower in TOWERS for layer in layers(clip.model, tower)]
    return list(dict.fromkeys(type(layer) for layer in every)) if config.train.compile else []


def load_trainable(clip: Clip, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's parameters into a freshly built model.

    Raises ConfigError when the base weights differ from those it was trained on, or a parameter is missing or unknown.
    """
    check_base(clip, checkpoint.state["base_digest"], checkpoint.path)
    copy_parameters(clip, [name for name, _ in trainable(clip.model)], checkpoint.path)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of everything that trains, in module order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def settling_of(config: Config, clip: Clip) -> Settling | None:
    """None where gates do not settle."""
    gate = config.gate
    if gate.settle_steps is None or not config.gated:
        return None
    return Settling(clip.model, gate.settle_steps, gate.settle_margin)


def gate_values(model: nn.Module, settling: Settling | None = None) -> dict[str, float]:
    """Scores and states of all gates, as the monitor reads them; empty without gates."""
    values = {} if settling is None else {"adapter/settled_blocks": float(settling.settled)}
    for target, gate in gate_map(model).items():
        if gate["score"] is not None:
            values[f"gate/{target}"] = gate["score"]
            values[f"open/{target}"] = float(gate["open"])
    return values


def checkpoint_state(
    config: Config, clip: Clip, data_digest: str, step: int, world: World, settling: Settling | None = None
) -> dict[str, Any]:
    """What state.json says: enough to rebuild the model around the saved parameters, and the gates as they stand."""
    gates = gate_map(clip.model)
    return {
        "format": "selora-checkpoint",
        "version": 1,
        "step": step,
        "samples_seen": step * config.train.global_batch_size,
        "base_digest": clip.digest,
        "data_digest": data_digest,
        "model": {"name": clip.name, "pretrained": clip.pretrained, "seed": config.seed},
        "adapter": {
            "kind": config.adapter.kind,
            "rank": config.adapter.rank,
            "alpha": config.adapter.alpha,
            "targets": list(gates),
            "gated": bool(gate_scores(clip.model)),
            "threshold": config.gate.threshold,
        },
        "gate_map": gates,
        **({} if settling is None else {"settling": settling.state()}),
        "written_by": {
            "world_size": world.world_size,
            "zero_stage": config.train.zero_stage,
            "torch": torch.__version__,
        },
    }
