"""The FLYP loss: symmetric InfoNCE over the global batch, exact over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.method.folded import full_precision

# CLIP's bound on the temperature (arXiv 2103.00020, section 2.5): exp(logit_scale) <= 100.
MAX_LOGIT_SCALE = 100.0
# Logits that a rank holds at once, 256 MiB in fp32; more are computed in chunks of rows, and again in the backward.
MOST_LOGITS = 2**26


def flyp_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    labels: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Mean of the image-to-text and text-to-image cross entropies over the batch of all ranks (arXiv 2212.00638).

    Each rank compares its own images with the texts of all ranks, once for both directions, and returns its own rows'
    part of the loss. The mean over ranks of the parameter gradients (which DDP and DeepSpeed compute) equals the
    gradient of one rank that holds the whole batch.

    Args:
        image_features, text_features: (B, D), normalised by the caller; row i of one belongs to row i of the other;
            B is the same on every rank.
        logit_scale: the factor itself (the third output of a CLIP forward, exp of the parameter), () or (1,).
        labels: (B,) int64 classes. Rows of the same class on any rank are then positives of each other, and the target
            of a row is uniform over its positives (the supervised contrastive loss, arXiv 2004.11362, in the form of
            UniCL, arXiv 2204.03610); a negative label is a class of its own. None: rows of the same class stay
            negatives of each other, as in FLYP.
        chunk_rows: rows of logits held at a time; None: as many as MOST_LOGITS allows.

    Returns:
        A scalar in at least fp32.
    """
    with full_precision(image_features.device):
        wide = torch.promote_types(image_features.dtype, torch.float32)
        scale = logit_scale.to(wide).reshape(())
        loss = _SymmetricLoss.apply(image_features.to(wide), text_features.to(wide), scale, labels, group, chunk_rows)
    assert isinstance(loss, Tensor)
    return loss


def rank_and_world(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(rank, world size)."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gather(local: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The tensors of all ranks, in rank order."""
    _, world = rank_and_world(group)
    if world == 1:
        return [local]
    parts = [torch.empty_like(local) for _ in range(world)]
    dist.all_gather(parts, local.contiguous(), group=group)
    return parts


class _SymmetricLoss(torch.autograd.Function):
    """S (B, W*B) are the logits of this rank's images, P and Q their softmax by rows and columns of the whole matrix.

    loss = mean over own i of (lse_row_i + lse_column_i) / 2 - sum_j T_ij S_ij, and dS = (P + Q - 2 T) / 2B, with T the
    targets: the identity, or uniform over the rows of the same class; T is symmetric, so it serves both directions. The
    log-sum-exp of a column is combined from its parts on all ranks, so no rank needs the images of another.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        labels: Tensor | None,
        group: dist.ProcessGroup | None,
        chunk_rows: int | None,
    ) -> Tensor:
        rank, world = rank_and_world(group)
        texts = text if world == 1 else torch.cat(gather(text, group))
        classes = None if labels is None else distinct(torch.cat(gather(labels, group)))
        rows, columns = len(image), len(texts)
        chunk = chunk_rows or max(1, MOST_LOGITS // columns)
        row_lse, positive = image.new_empty(rows), image.new_empty(rows)
        column_lse = image.new_full((columns,), -torch.inf)
        logits = image
        for part, logits in logits_in_chunks(image, texts, scale, chunk):
            row_lse[part] = logits.logsumexp(1)
            column_lse = torch.logaddexp(column_lse, logits.logsumexp(0))
            if classes is None:
                positive[part] = logits.diagonal(rank * rows + part.start)
            else:
                positive[part] = (logits * _targets(classes, rank * rows, part, logits)).sum(1)
        column_lse = torch.stack(gather(column_lse, group)).logsumexp(0)
        # a single chunk is kept for the backward; several are computed again there
        ctx.save_for_backward(image, texts, scale, row_lse, column_lse, classes, logits if chunk >= rows else None)
        ctx.group, ctx.chunk = group, chunk
        return (0.5 * (row_lse + column_lse[rank * rows : (rank + 1) * rows]) - positive).mean()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, row_lse, column_lse, classes, kept = ctx.saved_tensors
        rank, world = rank_and_world(ctx.group)
        rows = len(image)
        grad_image, grad_texts = torch.empty_like(image), torch.zeros_like(texts)
        grad_scale = torch.zeros_like(scale)
        chunks = [(slice(0, rows), kept)] if kept is not None else logits_in_chunks(image, texts, scale, ctx.chunk)
        for part, logits in chunks:
            grad = (logits - row_lse[part, None]).exp_().add_((logits - column_lse).exp_())
            if classes is None:
                grad.diagonal(rank * rows + part.start).sub_(2)
            else:
                grad.sub_(_targets(classes, rank * rows, part, logits), alpha=2)
            grad *= grad_outputs[0] / (2 * rows)
            unscaled = grad @ texts
            grad_scale += (unscaled * image[part]).sum()
            grad_image[part] = unscaled * scale
            grad_texts.addmm_(grad.T, image[part])
        grad_texts *= scale
        if world > 1:
            # all_reduce and a slice instead of reduce_scatter, which gloo does not offer for every dtype
            dist.all_reduce(grad_texts, group=ctx.group)
        return grad_image, grad_texts[rank * rows : (rank + 1) * rows], grad_scale, None, None, None


def logits_in_chunks(image: Tensor, texts: Tensor, scale: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits (chunk, texts) for images (B, D) and texts (N, D), chunk by chunk."""
    for start in range(0, len(image), chunk):
        part = slice(start, min(start + chunk, len(image)))
        yield part, (image[part] @ texts.T).mul_(scale)


def distinct(labels: Tensor) -> Tensor:
    """The labels of all ranks, with one of its own for each row that has none."""
    return torch.where(labels < 0, -1 - torch.arange(len(labels), device=labels.device), labels)


def _targets(classes: Tensor, first: int, part: slice, like: Tensor) -> Tensor:
    """Targets of the rows `part` of a rank whose rows begin at `first`, in the shape and dtype of their logits."""
    same = (classes[first + part.start : first + part.stop, None] == classes).to(like.dtype)
    return same / same.sum(1, keepdim=True)
