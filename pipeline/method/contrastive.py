"""The FLYP loss: symmetric InfoNCE over the global batch, exact over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


class _GatherWithGrad(torch.autograd.Function):
    """(2, B, D) on each rank -> (2, W*B, D) in rank order; the backward sums what every rank sends back to ours.

    all_reduce and a slice instead of reduce_scatter, which gloo does not offer for every dtype.
    """

    @staticmethod
    def forward(ctx, local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.rows = group, local.shape[1]
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return grad[:, start : start + ctx.rows], None


def flyp_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean of the image-to-text and text-to-image cross entropies over the batch of all ranks; scalar, fp32.

    image_features, text_features: (B, D), normalised by the caller; row i of both belongs together; B is the same on
    every rank. logit_scale: the factor itself (the third output of a CLIP forward, exp of the parameter), () or (1,).
    Rows of the same class stay negatives of each other, as in FLYP (arXiv 2212.00638).

    A rank computes only its own rows against all columns. The mean over ranks of the parameter gradients (what DDP and
    DeepSpeed compute) equals the gradient of one rank that holds the whole batch.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        wide = torch.promote_types(image_features.dtype, torch.float32)
        local = torch.stack([image_features, text_features]).to(wide)  # (2, B, D)
        rank, columns = 0, local
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            rank = dist.get_rank(group)
            columns = _GatherWithGrad.apply(local, group)
        assert isinstance(columns, Tensor)
        # images against texts and texts against images in one batched product: (2, B, W*B)
        logits = torch.bmm(local, columns.flip(0).transpose(1, 2)) * logit_scale.to(wide).reshape(())
        rows = local.shape[1]
        labels = torch.arange(rank * rows, (rank + 1) * rows, device=logits.device).repeat(2)
        return F.cross_entropy(logits.flatten(0, 1), labels)
