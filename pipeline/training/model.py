"""The model of a run with its blocks, its trained parameters, its objective, and its description in a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import Config, ConfigError
from pipeline.data.shards.index import ShardIndex
from pipeline.data.train.stream import Batch
from pipeline.method.adapter import attach_adapter, blocks, gate_map, gate_scores, random_targets, select_targets
from pipeline.method.budget import BlockBudget, blocks_of_budget
from pipeline.method.settle import Settling
from pipeline.model.clip import Clip
from pipeline.model.load import Model, load_model
from pipeline.model.restore import check_base, copy_parameters
from pipeline.model.towers import adapter_targets, apply_trainable, compile_layers, layers, towers_of
from pipeline.model.vit import Vit
from pipeline.model.weights import has_bias
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.cluster.distributed import World
from pipeline.training.objective import Classification, Contrastive, KeepSettings, Objective, PenaltySettings


def load_untouched(config: Config, classes: tuple[str, ...] | None = None, *, hollow: bool = False) -> Model:
    """The pretrained model alone.

    Args:
        classes: class names of a ViT's classifier.
        hollow: a CLIP without values, which another rank provides.
    """
    model = config.model
    return load_model(
        model.name,
        model.pretrained,
        seed=config.seed,
        classes=classes,
        image_size=model.image_size,
        hollow=hollow,
    )


def load_once(config: Config, classes: tuple[str, ...] | None, world: World, control: dist.ProcessGroup) -> Model:
    """The pretrained model, read by every rank, or only by rank 0 under ZeRO-3 if nothing runs it before the engine.

    The engine takes each parameter from rank 0 and keeps a rank's partition of it, so no other rank ever holds the
    whole base. Collective.
    """
    early = config.keep.weight or config.train.loss == "sigmoid"  # both encode samples with the untouched model
    if config.train.zero_stage < 3 or world.world_size == 1 or config.classifies or early:
        return load_untouched(config, classes)
    model = load_untouched(config, hollow=not world.is_main)
    assert isinstance(model, Clip)
    facts: list[Any] = [model.digest, model.model_cfg, model.preprocess_cfg]
    dist.broadcast_object_list(facts, 0, group=control)
    return replace(model, digest=facts[0], model_cfg=facts[1], preprocess_cfg=facts[2])


def attach_blocks(config: Config, model: Model) -> Model:
    """Attach the blocks of a run, in place, and let only the chosen parameters train. Returns `model`."""
    check_trainable(model)
    adapter, gate = config.adapter, config.gate
    if adapter.kind in ("lora", "dora"):
        targets = adapter_targets(model.model)
        try:
            attach_adapter(
                targets,
                rank=adapter.rank,
                kind=adapter.kind,
                alpha=adapter.alpha,
                gated=gate.enabled and adapter.random_k is None,
                gate_init=gate.init,
                threshold=gate.threshold,
                seed=config.seed,
                select=chosen_targets(config, list(targets)),
            )
        except ValueError as error:
            raise ConfigError(f"adapter.{error}") from error
    apply_trainable(model.model, config.train.train_rest, adapter.kind)
    return model


def chosen_targets(config: Config, targets: Sequence[str]) -> list[str]:
    """The targets among those of the model that carry blocks; ValueError for an option that matches none."""
    adapter = config.adapter
    # A ViT has no text tower, so `text` among the towers does not apply to it.
    has_text = any(target.startswith("text.") for target in targets)
    towers = [tower for tower in adapter.towers if tower != "text" or has_text] or adapter.towers
    names = select_targets(targets, towers, adapter.projections, adapter.targets)
    return names if adapter.random_k is None else random_targets(names, adapter.random_k, config.seed)


def classes_of(config: Config, index: ShardIndex) -> tuple[str, ...] | None:
    """Class names of the classifier of a ViT; None for a CLIP.

    Raises:
        ConfigError: the shards have no classes and the model or `train.positives` needs them.
    """
    by_class = config.train.positives == "class"
    if (config.classifies or by_class) and (index.classes is None or len(index.classes) < 2):
        what, other = f"model.name={config.model.name} is trained as a classifier", ""
        if by_class:
            what, other = "train.positives=class needs classes", ", or use train.positives=own"
        raise ConfigError(
            f"data.train={index.folder.location}: {what}, and these shards have no classes; pack class folders, or a "
            f"table with a class column{other}"
        )
    return index.classes if config.classifies else None


def targets_of(batch: Batch) -> Tensor:
    """The targets of a batch for the task of a model: tokens (B, L), or classes (B,)."""
    if batch.tokens is not None:
        return batch.tokens
    if int(batch.labels.min()) < 0:
        nameless = batch.keys[int(batch.labels.argmin())]
        raise ConfigError(f"data.train: {nameless} has no class, and the model is trained as a classifier")
    return batch.labels


def objective_of(config: Config, model: Model, compiled: bool = False) -> Objective:
    """The objective of the run, computed as section train says: in micro-batches, layers kept or recomputed.

    Args:
        model: the model with its blocks; if `compiled`, its layers are compiled in place.
    """
    gate = config.gate
    if config.train.activation_checkpointing:
        model.model.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
    if compiled:
        compile_layers(model.model)
    return Objective(
        model.model,
        _task_of(config, model),
        [block.gate for block in blocks(model.model).values() if block.gate is not None],
        PenaltySettings(gate.penalty, gate.reduction, gate.lam, gate.threshold, gate.delay_steps),
        mean=model.preprocess_cfg["mean"],
        std=model.preprocess_cfg["std"],
        precision=config.model.precision,
        micro_batch=config.train.micro_batch_size,
        keep=KeepSettings(config.keep.weight, config.keep.replay) if config.keep.weight else None,
    )


def check_trainable(model: Model) -> None:
    """Raise ConfigError for a model that has no loss in this package."""
    kind = type(model.model).__name__
    if kind == "CoCa":
        raise ConfigError(f"model.name={model.name}: a {kind} has a caption decoder, whose loss is not implemented")


def _task_of(config: Config, model: Model) -> Classification | Contrastive:
    if isinstance(model, Vit):
        return Classification(with_features=config.keep.weight > 0)
    loss = config.train.loss
    return Contrastive(sigmoid=has_bias(model.model) if loss == "auto" else loss == "sigmoid")


def layer_classes(model: Model) -> list[type[nn.Module]]:
    """Classes of the residual layers of all towers."""
    every = [layer for tower in towers_of(model.model) for layer in layers(model.model, tower)]
    return list(dict.fromkeys(type(layer) for layer in every))


def load_trainable(model: Model, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's parameters into a newly built model.

    Raises ConfigError if the base weights differ from those it was trained on, or a parameter is missing or unknown.
    """
    check_base(model, checkpoint.state["base_digest"], checkpoint.path)
    copy_parameters(model, [name for name, _ in trainable(model.model)], checkpoint.path)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of everything that trains, in module order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def settling_of(config: Config, model: Model) -> Settling | None:
    """The settling of gates; None if gates do not settle."""
    gate = config.gate
    if gate.settle_steps is None or not config.gated:
        return None
    return Settling(model.model, gate.settle_steps, gate.settle_margin)


def budget_of(config: Config, model: Model, total: int) -> BlockBudget | None:
    """The budget by `gate.budget` or `gate.budget_parameters`; None without either.

    Raises:
        ConfigError: the model has fewer gated blocks, or none that is small enough.
    """
    gate = config.gate
    if not config.gated or not gate.budgeted:
        return None
    try:
        if gate.budget_parameters is not None:
            return BlockBudget(model.model, gate.budget_parameters, total, parameters=True)
        assert gate.budget is not None
        return BlockBudget(model.model, blocks_of_budget(gate.budget, len(gate_scores(model.model))), total)
    except ValueError as error:
        raise ConfigError(f"gate.{error}") from error


def score_rate(config: Config) -> float:
    """Peak learning rate of the scores; under a budget they are set, not trained."""
    return 0.0 if config.gate.budgeted else config.gate.lr or config.train.lr


def gate_values(model: nn.Module, settling: Settling | None = None) -> dict[str, float]:
    """Scores and states of all gates for the monitor; empty without gates."""
    values = {} if settling is None else {"adapter/settled_blocks": float(settling.settled)}
    for target, gate in gate_map(model).items():
        if gate["score"] is not None:
            values[f"gate/{target}"] = gate["score"]
            values[f"open/{target}"] = float(gate["open"])
    return values


def checkpoint_state(
    config: Config,
    model: Model,
    data_digest: str,
    step: int,
    world: World,
    settling: Settling | None = None,
    budget: BlockBudget | None = None,
) -> dict[str, Any]:
    """Content of state.json: enough to rebuild the model around the saved parameters, and the state of the gates."""
    gates = gate_map(model.model)
    return {
        "format": "selora-checkpoint",
        "version": 1,
        "step": step,
        "samples_seen": step * config.train.global_batch_size,
        "base_digest": model.digest,
        "data_digest": data_digest,
        "model": {
            "name": model.name,
            "pretrained": model.pretrained,
            "seed": config.seed,
            **({} if model.image_size is None else {"image_size": model.image_size}),
            **({"classes": list(model.classes or ())} if isinstance(model, Vit) else {"added_bias": model.added_bias}),
        },
        "adapter": {
            "kind": config.adapter.kind,
            "rank": config.adapter.rank,
            "alpha": config.adapter.alpha,
            "targets": list(gates),
            "gated": bool(gate_scores(model.model)),
            "threshold": config.gate.threshold,
        },
        "gate_map": gates,
        **({} if settling is None else {"settling": settling.state()}),
        **({} if budget is None else {"budget": budget.state()}),
        "written_by": {
            "world_size": world.world_size,
            "zero_stage": config.train.stage(world.world_size),
            "torch": torch.__version__,
        },
    }
