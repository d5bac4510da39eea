"""Normalised features of images and texts: the only place where evaluation runs the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import ConfigError

Precision = Literal["fp32", "bf16"]

# An image may have any number of captions: their number must not decide the memory of a forward.
TEXTS_PER_FORWARD = 512


@dataclass(frozen=True)
class Encoder:
    """A merged CLIP in eval mode; `model` has `encode_image(images)` and `encode_text(tokens)`."""

    model: Any  # an nn.Module, whose typed attributes would be tensors or modules
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    precision: Precision = "fp32"

    def images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) transformed images -> (B, D) fp32 unit vectors on the device."""
        return self._features(self.model.encode_image, images)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """B strings -> (B, D) fp32 unit vectors on the device."""
        chunks = range(0, len(texts), TEXTS_PER_FORWARD)
        tokens = (self.tokenizer(list(texts[start : start + TEXTS_PER_FORWARD])) for start in chunks)
        return torch.cat([self._features(self.model.encode_text, each) for each in tokens])

    def _features(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        # bf16 is autocast, as in training: the weights stay fp32, and so do the normalisation and the logits after it.
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            features = encode(inputs.to(self.device))
        features = F.normalize(features.float(), dim=-1)
        if not bool(features.isfinite().all()):
            # argmax and topk take NaN for the largest number, so the accuracy of a diverged model would look like one.
            raise ConfigError("the model gives features that are not finite: its training has diverged")
        return features
