"""What one step minimises: the task's loss of a batch plus the gate penalty, as one module.

The task is FLYP's contrastive loss of a CLIP, or the cross entropy of a classifier.

It is a module so that ZeRO-3 gathers every parameter it touches, the scores of the penalty included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.method.contrastive import MAX_LOGIT_SCALE, flyp_loss
from pipeline.method.gate import Gate, read_gates
from pipeline.method.penalty import PenaltyKind, Reduction, gate_penalty


@dataclass(frozen=True)
class PenaltySettings:
    """Form and weight of the gate penalty; `delay_steps` is counted from the first step."""

    kind: PenaltyKind
    reduction: Reduction
    lam: float
    threshold: float
    delay_steps: int


class _CapScale(torch.autograd.Function):
    """min(scale, 100) whose gradient vanishes only where it would push further up: at the cap it can still come down.

    A plain clamp would hold OpenAI's weights, which start at the cap, there for ever.
    """

    @staticmethod
    def forward(ctx, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return scale.clamp(max=MAX_LOGIT_SCALE)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        (scale,) = ctx.saved_tensors
        (grad,) = grads
        return torch.where((scale >= MAX_LOGIT_SCALE) & (grad < 0), torch.zeros_like(grad), grad)


class Task(Protocol):
    """What a model is trained for. `targets` has a row for each image."""

    def outputs(self, model: Any, pixels: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """What the loss needs of the model: tensors with a row for each image, and such as are the same for all."""
        ...

    def losses(self, outputs: tuple[Tensor, ...], targets: Tensor) -> dict[str, Tensor]:
        """The scalar `task`, and what else shall be seen of a step. The mean over ranks of the gradients of `task` is
        the gradient of the global batch."""
        ...


class Contrastive:
    """A CLIP under the FLYP loss (method notes 3.1). Targets: tokens (B, context) of the captions."""

    def outputs(self, model: Any, pixels: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Normalised features (B, D) of both towers and the logit scale."""
        return model(pixels, targets)

    def losses(self, outputs: tuple[Tensor, ...], targets: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 - by protocol
        image_features, text_features, scale = outputs
        scale = _CapScale.apply(scale.squeeze())
        return {"task": flyp_loss(image_features, text_features, scale), "logit_scale": scale}


class Classification:
    """A classifier under the cross entropy (method notes 6). Targets: classes (B,)."""

    def outputs(self, model: Any, pixels: Tensor, targets: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002 - by protocol
        """Logits (B, classes)."""
        return (model(pixels),)

    def losses(self, outputs: tuple[Tensor, ...], targets: Tensor) -> dict[str, Tensor]:
        logits = outputs[0].float()
        hits = (logits.argmax(1) == targets).float()
        return {"task": F.cross_entropy(logits, targets), "accuracy": hits.mean()}


class Objective(nn.Module):
    """A model under the loss of its task with the gate penalty (paper eq. 4).

    micro_batch: images that go through the model at a time (None: all). It bounds the memory and leaves loss and
    gradient those of the whole batch (GradCache, arXiv 2101.06983): features are computed without keeping what led to
    them, and in the backward each micro-batch is computed again when its features have their gradients. To autograd it
    is one graph, so every parameter gets its gradient once, and DeepSpeed reduces it once, under any ZeRO stage.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        gates: list[Gate],
        penalty: PenaltySettings,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        precision: str,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._task = task
        self._gates = gates  # a plain list: their blocks own them
        self._penalty = penalty
        self._precision = precision
        self._micro_batch = micro_batch
        self.register_buffer("_mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor, targets: Tensor, step: int) -> dict[str, Tensor]:
        """images (B, 3, H, W) uint8 and targets of this rank -> scalars total, task, penalty and what the task adds."""
        read_gates(self._gates)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            outputs = self._outputs(images, targets)
        parts = self._task.losses(outputs, targets)
        penalty = self._gate_penalty(step, parts["task"])
        shown = {name: value.detach() for name, value in {**parts, "penalty": penalty}.items()}
        return {"total": parts["task"] + penalty, **shown}

    def _outputs(self, images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        size = self._micro_batch or len(images)
        if size >= len(images):
            return self._run(images, targets)
        parts = [
            checkpoint(self._run, *pairs, use_reentrant=False)
            for pairs in zip(images.split(size), targets.split(size), strict=True)
        ]
        # One row for each image, or one value for all of them.
        return tuple(torch.cat(each) if each[0].ndim > 1 else each[-1] for each in zip(*parts, strict=True))

    def _run(self, images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return self._task.outputs(self.model, (images.to(self._mean.dtype) - self._mean) / self._std, targets)

    def _gate_penalty(self, step: int, like: Tensor) -> Tensor:
        settings = self._penalty
        if not self._gates or step < settings.delay_steps:
            return torch.zeros_like(like)
        # Read as an attribute of its gate, for that is what makes ZeRO-3 gather a score.
        scores = [gate.score for gate in self._gates]
        return gate_penalty(scores, settings.kind, settings.lam, settings.reduction, settings.threshold)
