"""Keeping what the untouched model knows: distance of features to those of the untouched towers.

For unit vectors |f - f0|^2 = 2 (1 - cos(f, f0)), so this is feature distillation as in TRACER (arXiv 2605.29380), with
f0 fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.method.folded import full_precision


def drift(features: Tensor, untouched: Tensor) -> Tensor:
    """Mean of 1 - cos(f, f0) over rows.

    Args:
        features: (N, D) of the model in training; rows of any length.
        untouched: (N, D) of the untouched model for the same inputs, a constant.

    Returns:
        A scalar in at least fp32. The mean over ranks with equal N is that of all rows, and so is its gradient.
    """
    with full_precision(features.device):
        wide = torch.promote_types(features.dtype, torch.float32)
        return (1 - F.cosine_similarity(features.to(wide), untouched.to(wide), dim=-1)).mean()


def keep_loss(
    image: Tensor | None, image_untouched: Tensor | None, text: Tensor | None, text_untouched: Tensor | None
) -> Tensor:
    """mean(1 - cos(f(x), f0(x))) over reference images x plus mean(1 - cos(g(t), g0(t))) over reference texts t.

    Args:
        image, image_untouched: (R, D) each, or None without reference images.
        text, text_untouched: (T, D) each, or None without reference texts.

    Raises:
        ValueError: with neither images nor texts.
    """
    pairs = [(image, image_untouched), (text, text_untouched)]
    parts = [drift(now, before) for now, before in pairs if now is not None and before is not None]
    if not parts:
        raise ValueError("keep_loss needs reference images or reference texts")
    return torch.stack(parts).sum()
