"""What one step minimises: the FLYP loss of a batch plus the gate penalty, as one module.

It is a module so that ZeRO-3 gathers every parameter it touches, the scores of the penalty included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.method.contrastive import flyp_loss
from pipeline.method.gate import Gate, read_gates
from pipeline.method.penalty import PenaltyKind, Reduction, gate_penalty

# open_clip's and OpenAI's bound on the temperature: exp(logit_scale) <= 100.
MAX_LOGIT_SCALE = 100.0


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


class Objective(nn.Module):
    """CLIP under the FLYP loss (method notes 3.1) with the gate penalty (paper eq. 4).

    micro_batch: pairs that go through the towers at a time (None: all). It bounds the memory and leaves loss and
    gradient those of the whole batch (GradCache, arXiv 2101.06983): features are computed without keeping what led to
    them, and in the backward each micro-batch is computed again when its features have their gradients. To autograd it
    is one graph, so every parameter gets its gradient once, and DeepSpeed reduces it once, under any ZeRO stage.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        clip: nn.Module,
        gates: list[Gate],
        penalty: PenaltySettings,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        precision: str,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.clip = clip
        self._gates = gates  # a plain list: their blocks own them
        self._penalty = penalty
        self._precision = precision
        self._micro_batch = micro_batch
        self.register_buffer("_mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor, tokens: Tensor, step: int) -> dict[str, Tensor]:
        """images (B, 3, H, W) uint8, tokens (B, context) of this rank -> scalars total, task, penalty, logit_scale."""
        read_gates(self._gates)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            image_features, text_features, scale = self._features(images, tokens)
        scale = _CapScale.apply(scale.squeeze())
        task = flyp_loss(image_features, text_features, scale)
        penalty = self._gate_penalty(step, task)
        parts = {"task": task, "penalty": penalty, "logit_scale": scale}
        return {"total": task + penalty, **{name: value.detach() for name, value in parts.items()}}

    def _features(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised features (B, D) of both towers and the logit scale."""
        size = self._micro_batch or len(images)
        if size >= len(images):
            return self._towers(images, tokens)
        parts = [
            checkpoint(self._towers, *pairs, use_reentrant=False)
            for pairs in zip(images.split(size), tokens.split(size), strict=True)
        ]
        image_features, text_features, scales = zip(*parts, strict=True)
        return torch.cat(image_features), torch.cat(text_features), scales[-1]

    def _towers(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.clip((images.to(self._mean.dtype) - self._mean) / self._std, tokens)

    def _gate_penalty(self, step: int, like: Tensor) -> Tensor:
        settings = self._penalty
        if not self._gates or step < settings.delay_steps:
            return torch.zeros_like(like)
        # Read as an attribute of its gate, for that is what makes ZeRO-3 gather a score.
        scores = [gate.score for gate in self._gates]
        return gate_penalty(scores, settings.kind, settings.lam, settings.reduction, settings.threshold)


def capped_logit_scale(value: Tensor) -> Tensor:
    """The stored parameter after training: never above the cap that the forward applied."""
    return value.clamp(max=math.log(MAX_LOGIT_SCALE))
