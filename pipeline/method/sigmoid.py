"""The sigmoid loss of SigLIP: each pair of the global batch is judged on its own; exact over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from pipeline.method.contrastive import MOST_LOGITS, distinct, gather, logits_in_chunks, rank_and_world
from pipeline.method.folded import full_precision


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    labels: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum over all texts, mean over images, of -log sigmoid(z (t cos + b)) (arXiv 2303.15343, equation 1).

    Each rank compares its own images with the texts of all ranks. The mean over ranks of the parameter gradients (which
    DDP and DeepSpeed compute) equals the gradient of one rank that holds the whole batch.

    Args:
        image_features, text_features: (B, D), normalised by the caller; row i of one belongs to row i of the other;
            B is the same on every rank.
        logit_scale: t, the factor itself (exp of the parameter), () or (1,).
        logit_bias: b, () or (1,).
        labels: (B,) int64 classes. Rows of the same class on any rank are then positives of each other (z = 1); a
            negative label is a class of its own. None: each text is the positive of its own image only.
        chunk_rows: rows of logits held at a time; None: as many as MOST_LOGITS allows.

    Returns:
        A scalar in at least fp32.
    """
    with full_precision(image_features.device):
        wide = torch.promote_types(image_features.dtype, torch.float32)
        scale, bias = (value.to(wide).reshape(()) for value in (logit_scale, logit_bias))
        images, texts = image_features.to(wide), text_features.to(wide)
        loss = _SigmoidLoss.apply(images, texts, scale, bias, labels, group, chunk_rows)
    assert isinstance(loss, Tensor)
    return loss


class _SigmoidLoss(torch.autograd.Function):
    """S (B, W*B) are the logits of this rank's images and P the 0/1 matrix of positives.

    loss = -sum of log sigmoid(S) where P = 1 and of log sigmoid(-S) where P = 0, over B; dS = (sigmoid(S) - P) / B.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        labels: Tensor | None,
        group: dist.ProcessGroup | None,
        chunk_rows: int | None,
    ) -> Tensor:
        rank, world = rank_and_world(group)
        texts = text if world == 1 else torch.cat(gather(text, group))
        classes = None if labels is None else distinct(torch.cat(gather(labels, group)))
        rows = len(image)
        chunk = chunk_rows or max(1, MOST_LOGITS // len(texts))
        total, logits = image.new_zeros(()), image
        for part, logits in logits_in_chunks(image, texts, scale, chunk):
            logits += bias
            positive = _positives(classes, rank * rows, part, logits)
            total -= F.logsigmoid(torch.where(positive, logits, -logits)).sum()
        # a single chunk is kept for the backward; several are computed again there
        ctx.save_for_backward(image, texts, scale, bias, classes, logits if chunk >= rows else None)
        ctx.group, ctx.chunk = group, chunk
        return total / rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, bias, classes, kept = ctx.saved_tensors
        rank, world = rank_and_world(ctx.group)
        rows = len(image)
        grad_image, grad_texts = torch.empty_like(image), torch.zeros_like(texts)
        grad_scale, grad_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        again = ((part, each + bias) for part, each in logits_in_chunks(image, texts, scale, ctx.chunk))
        for part, logits in [(slice(0, rows), kept)] if kept is not None else again:
            grad = logits.sigmoid() - _positives(classes, rank * rows, part, logits).to(logits.dtype)
            grad *= grad_outputs[0] / rows
            grad_bias += grad.sum()
            unscaled = grad @ texts
            grad_scale += (unscaled * image[part]).sum()
            grad_image[part] = unscaled * scale
            grad_texts.addmm_(grad.T, image[part])
        grad_texts *= scale
        if world > 1:
            # all_reduce and a slice instead of reduce_scatter, which gloo does not offer for every dtype
            dist.all_reduce(grad_texts, group=ctx.group)
        return grad_image, grad_texts[rank * rows : (rank + 1) * rows], grad_scale, grad_bias, None, None, None


def _positives(classes: Tensor | None, first: int, part: slice, like: Tensor) -> Tensor:
    """Boolean, in the shape of the logits of the rows `part` of a rank whose rows begin at `first`."""
    if classes is not None:
        return classes[first + part.start : first + part.stop, None] == classes
    positive = torch.zeros_like(like, dtype=torch.bool)
    positive.diagonal(first + part.start).fill_(True)
    return positive
