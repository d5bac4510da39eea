"""The objective of a step as one module: the task's loss of a batch plus the gate penalty.

The task is the contrastive or the sigmoid loss of a CLIP, or the cross entropy of a classifier.

It is a module so that ZeRO-3 gathers every parameter that it reads, including the scores for the penalty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.data.reference.samples import Reference
from pipeline.method.contrastive import MAX_LOGIT_SCALE, flyp_loss
from pipeline.method.gate import Gate, read_gates
from pipeline.method.keep import drift, keep_loss
from pipeline.method.penalty import PenaltyKind, Reduction, gate_penalty
from pipeline.method.sigmoid import sigmoid_loss


@dataclass(frozen=True)
class PenaltySettings:
    """Form and weight of the gate penalty; `delay_steps` counts from the first step."""

    kind: PenaltyKind
    reduction: Reduction
    lam: float
    threshold: float
    delay_steps: int


class _CapScale(torch.autograd.Function):
    """min(scale, 100) with a zero gradient only where it would raise the scale further: at the cap it can still fall.

    A plain clamp would keep OpenAI's weights, which start at the cap, there forever.
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


Outputs = tuple[Tensor, ...]
Features = tuple[Tensor | None, Tensor | None]


class Task(Protocol):
    """The task that a model is trained for. `targets` has a row for each image.

    Images and texts of reference samples follow those of the batch in the same forward.
    """

    def joined(self, images: Tensor, targets: Tensor, reference: Reference) -> tuple[Tensor, Tensor]:
        """Images (B + R, 3, H, W) and targets, those of the reference samples last."""
        ...

    def outputs(self, model: Any, pixels: Tensor, targets: Tensor) -> Outputs:
        """The model's outputs for the loss: tensors with a row for each input, and tensors that all share."""
        ...

    def parted(self, outputs: Outputs, images: int, targets: int) -> tuple[Outputs, Features]:
        """The outputs of the batch, and image and text features of the reference samples, None without them."""
        ...

    def features(self, model: Any, pixels: Tensor, tokens: Tensor) -> Features:
        """Only image and text features; None without rows."""
        ...

    def losses(self, outputs: Outputs, targets: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """The scalar `task`, and other values to record.

        The mean over ranks of the gradients of `task` is the gradient of the global batch.
        """
        ...


@dataclass(frozen=True)
class Contrastive:
    """A CLIP with the FLYP loss (arXiv 2212.00638). Targets: tokens (B, context) of the captions.

    sigmoid: use SigLIP's loss instead (arXiv 2303.15343), for a model with a logit bias.
    """

    sigmoid: bool = False

    def joined(self, images: Tensor, targets: Tensor, reference: Reference) -> tuple[Tensor, Tensor]:
        tokens = _stacked(targets, reference.tokens) if len(reference.tokens) else targets
        return _joined_images(images, reference), tokens

    def outputs(self, model: Any, pixels: Tensor, targets: Tensor) -> Outputs:
        """Normalised features (B, D) of both towers, the logit scale and, if the model has one, the logit bias."""
        return model(pixels, targets)

    def parted(self, outputs: Outputs, images: int, targets: int) -> tuple[Outputs, Features]:
        image, text, *logit = outputs
        return (image[:images], text[:targets], *logit), (_rest(image, images), _rest(text, targets))

    def features(self, model: Any, pixels: Tensor, tokens: Tensor) -> Features:
        image, text, *_ = model(pixels if len(pixels) else None, tokens if len(tokens) else None)
        return image, text

    def losses(self, outputs: Outputs, targets: Tensor, labels: Tensor | None) -> dict[str, Tensor]:  # noqa: ARG002
        """labels: classes (B,) if captions of the same class are also positives, else None."""
        image, text, scale, *bias = outputs
        # CLIP's bound does not hold for SigLIP: its published models are above it.
        logit = {"logit_scale": scale.squeeze() if bias else _CapScale.apply(scale.squeeze())}
        if bias:
            logit["logit_bias"] = bias[0].squeeze()
        return {"task": self.of_pairs(image, text, logit, labels), **logit}

    def of_pairs(
        self, image: Tensor, text: Tensor, logit: Mapping[str, Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """The loss of features (B, D) that match row by row. logit: logit_scale and, optionally, logit_bias."""
        scale, bias = logit["logit_scale"], logit.get("logit_bias")
        if self.sigmoid:
            assert bias is not None, "objective_of makes sure of it"
            return sigmoid_loss(image, text, scale, bias, labels=labels)
        loss = flyp_loss(image, text, scale, labels=labels)
        # A softmax ignores a constant added to all logits, so the gradient of the bias is zero.
        return loss if bias is None else loss + 0 * bias


@dataclass(frozen=True)
class Classification:
    """A classifier with the cross entropy. Targets: classes (B,).

    with_features: also return the features before the classifier, for reference images.
    """

    with_features: bool = False

    def joined(self, images: Tensor, targets: Tensor, reference: Reference) -> tuple[Tensor, Tensor]:
        return _joined_images(images, reference), targets

    def outputs(self, model: Any, pixels: Tensor, targets: Tensor) -> Outputs:  # noqa: ARG002 - by protocol
        """Logits (B, classes), and features (B, D) if needed."""
        if not self.with_features:
            return (model(pixels),)
        features = model.encode_image(pixels)
        return model.head(features), features

    def parted(self, outputs: Outputs, images: int, targets: int) -> tuple[Outputs, Features]:  # noqa: ARG002
        logits, features = outputs
        return (logits[:images],), (_rest(features, images), None)

    def features(self, model: Any, pixels: Tensor, tokens: Tensor) -> Features:  # noqa: ARG002 - by protocol
        return model.encode_image(pixels), None

    def losses(self, outputs: Outputs, targets: Tensor, labels: Tensor | None) -> dict[str, Tensor]:  # noqa: ARG002
        logits = outputs[0].float()
        hits = (logits.argmax(1) == targets).float()
        return {"task": F.cross_entropy(logits, targets), "accuracy": hits.mean()}


def _stacked(one: Tensor, other: Tensor) -> Tensor:
    """Tokens (B, L) and (T, M) -> (B + T, max(L, M)), the shorter ones padded with 0 as open_clip pads."""
    length = max(one.shape[1], other.shape[1])
    return torch.cat([F.pad(each, (0, length - each.shape[1])) for each in (one, other)])


def _joined_images(images: Tensor, reference: Reference) -> Tensor:
    return torch.cat([images, reference.images]) if len(reference.images) else images


def _rest(rows: Tensor, first: int) -> Tensor | None:
    return rows[first:] if len(rows) > first else None


@dataclass(frozen=True)
class KeepSettings:
    """Weights of the distance to the untouched model and of replayed pairs, on reference samples."""

    weight: float
    replay: float


class Objective(nn.Module):
    """A model with the loss of its task, the gate penalty (paper eq. 4) and the distance to the untouched model.

    The distance on reference samples is added if `keep` is given. They join the batch in one forward, so that DeepSpeed
    sees one forward and one backward per step.

    micro_batch: images that go through the model at a time (None: all). It bounds the memory and keeps the loss and
    gradient of the whole batch (GradCache, arXiv 2101.06983): features are computed without keeping activations, and in
    the backward each micro-batch is recomputed once its features have their gradients. To autograd it is one graph, so
    every parameter gets its gradient once, and DeepSpeed reduces it once, under any ZeRO stage.
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
        keep: KeepSettings | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._task = task
        self._gates = gates  # a plain list, because their blocks own them
        self._penalty = penalty
        self._precision = precision
        self._micro_batch = micro_batch
        self._keep = keep
        self.register_buffer("_mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(
        self,
        images: Tensor | None,
        targets: Tensor | None,
        step: int,
        reference: Reference | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One step's loss.

        Args:
            images: (B, 3, H, W) uint8 of this rank; None: only measure the distance on the reference samples.
            targets: targets of this rank, a row for each image.
            step: optimizer steps finished before this one.
            reference: this rank's reference samples, None without any.
            labels: (B,) classes of the images if captions of the same class are positives, else None.

        Returns:
            Scalars total, task, penalty, the task's additional values, and with reference samples keep and replay; or
            only the drift of images and of texts.
        """
        if self._mean.device.type == "cpu":
            read_gates(self._gates)
        if images is None or targets is None:
            assert reference is not None
            return self._drift(reference)
        if reference is None or self._keep is None:
            with self._autocast(images):
                outputs = self._outputs(images, targets)
            parts = self._task.losses(outputs, targets, labels)
            more = {}
        else:
            with self._autocast(images):
                joined = self._outputs(*self._task.joined(images, targets, reference))
            outputs, features = self._task.parted(joined, len(images), len(targets))
            parts = self._task.losses(outputs, targets, labels)
            more = self._kept(self._keep, features, reference, parts)
        penalty = self._gate_penalty(step, parts["task"])
        total = sum(more.values(), parts["task"] + penalty)
        shown = {name: value.detach() for name, value in {**parts, **more, "penalty": penalty}.items()}
        return {"total": total, **shown}

    def _autocast(self, images: Tensor) -> AbstractContextManager[object]:
        return torch.autocast(images.device.type, torch.bfloat16) if self._precision == "bf16" else nullcontext()

    def _kept(
        self, settings: KeepSettings, features: Features, reference: Reference, parts: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The weighted distance to the untouched model and, if they count, the weighted loss of replayed pairs."""
        image, text = features
        distance = keep_loss(image, reference.image_features, text, reference.text_features)
        found = {"keep": settings.weight * distance}
        if settings.replay:
            assert image is not None, "replay needs images"
            assert text is not None, "replay needs captions"
            assert isinstance(self._task, Contrastive), "replay is for a CLIP"
            found["replay"] = settings.replay * self._task.of_pairs(image, text[: len(image)], parts)
        return found

    @torch.no_grad()
    def _drift(self, reference: Reference) -> dict[str, Tensor]:
        """drift_image and drift_text, the mean of 1 - cos, as far as there are samples."""
        images, image_untouched, tokens, text_untouched = reference
        found = {}
        if len(images):
            found["drift_image"] = drift(self._features(images, tokens[:0], 0), image_untouched)
        if len(tokens):
            found["drift_text"] = drift(self._features(images[:0], tokens, 1), text_untouched)
        return found

    def _features(self, images: Tensor, tokens: Tensor, which: int) -> Tensor:
        """(N, D) features of images or of tokens, the other being empty, a micro-batch at a time. which: 0 or 1."""
        size = self._micro_batch or max(len(images), len(tokens))
        starts = range(0, max(len(images), len(tokens)), size)
        found = []
        with self._autocast(self._mean):
            for start in starts:
                pixels = self._normalized(images[start : start + size])
                part = self._task.features(self.model, pixels, tokens[start : start + size])[which]
                assert part is not None, "there are rows of this kind"
                found.append(part)
        return torch.cat(found)

    def _outputs(self, images: Tensor, targets: Tensor) -> Outputs:
        size = self._micro_batch or len(images)
        if size >= len(images):
            return self._run(images, targets)
        if len(images) == len(targets):
            pairs = zip(images.split(size), targets.split(size), strict=True)
        else:
            count = min(math.ceil(max(len(images), len(targets)) / size), len(images), len(targets))
            pairs = zip(images.tensor_split(count), targets.tensor_split(count), strict=True)
        parts = [checkpoint(self._run, *pair, use_reentrant=False) for pair in pairs]
        # One row for each input, or one value for all of them.
        return tuple(torch.cat(each) if each[0].ndim > 1 else each[-1] for each in zip(*parts, strict=True))

    def _run(self, images: Tensor, targets: Tensor) -> Outputs:
        return self._task.outputs(self.model, self._normalized(images), targets)

    def _normalized(self, images: Tensor) -> Tensor:
        return (images.to(self._mean.dtype) - self._mean) / self._std

    def _gate_penalty(self, step: int, like: Tensor) -> Tensor:
        settings = self._penalty
        if not self._gates or step < settings.delay_steps:
            return torch.zeros_like(like)
        # Read as an attribute of its gate, because that makes ZeRO-3 gather the score.
        scores = [gate.score for gate in self._gates]
        return gate_penalty(scores, settings.kind, settings.lam, settings.reduction, settings.threshold)
