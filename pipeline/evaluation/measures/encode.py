"""Normalised features of images and texts; the only module of the evaluation that runs the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import ConfigError

Precision = Literal["fp32", "bf16"]

# An image may have any number of captions, which must not determine the memory of a forward.
TEXTS_PER_FORWARD = 512


@dataclass(frozen=True)
class Encoder:
    """A merged model in eval mode; it has `encode_image(images)` and, if it reads texts, `encode_text(tokens)`."""

    model: Any  # an nn.Module, whose typed attributes would be tensors or modules
    tokenizer: Callable[[list[str]], Tensor] | None
    device: torch.device
    precision: Precision = "fp32"

    def images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) transformed images -> (B, D) fp32 unit vectors on the device."""
        return self._features(self.model.encode_image, images)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """B strings -> (B, D) fp32 unit vectors on the device. ValueError for a model that reads no texts."""
        if self.tokenizer is None:
            raise ValueError("this model reads no texts")
        chunks = range(0, len(texts), TEXTS_PER_FORWARD)
        tokens = (self.tokenizer(list(texts[start : start + TEXTS_PER_FORWARD])) for start in chunks)
        return torch.cat([self._features(self.model.encode_text, each) for each in tokens])

    def scores(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) transformed images -> the logits (B, classes) of the model's own classifier, fp32."""
        return self._run(self.model, images)

    def _features(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        return F.normalize(self._run(encode, inputs), dim=-1)

    def _run(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        # bf16 is autocast, as in training: the weights stay fp32, and so do the normalisation and the logits after it.
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            found = encode(inputs.to(self.device)).float()
        if not bool(found.isfinite().all()):
            # argmax and topk treat NaN as the largest number, so a diverged model would seem to have an accuracy.
            raise ConfigError("the model gives features that are not finite: its training has diverged")
        return found
