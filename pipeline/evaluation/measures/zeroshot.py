"""Zero-shot classification: a classifier head from class names in templates, and its logits for images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.evaluation.measures.encode import TEXTS_PER_FORWARD, Encoder
from pipeline.evaluation.measures.ranks import Ranks
from pipeline.prompts import caption

# CLIP_benchmark's constant. It does not change the order, but it decides rounding ties.
LOGIT_SCALE = 100.0


def classifier_head(encoder: Encoder, classnames: Sequence[str], templates: Sequence[str], ranks: Ranks) -> Tensor:
    """(K, D) unit vectors: for each class, the normalised mean of the normalised features of its prompts.

    This order (normalise, mean, normalise) is that of CLIP, FLYP, open_clip and CLIP_benchmark. The templates have
    `{c}` in place of the class name. Classes are encoded in chunks, shared by the ranks.
    """
    per_chunk = max(1, TEXTS_PER_FORWARD // len(templates))
    starts = range(0, len(classnames), per_chunk)

    def encode_share() -> dict[int, Tensor]:
        return {
            i: _class_vectors(encoder, classnames[starts[i] : starts[i] + per_chunk], templates).cpu()
            for i in ranks.share(len(starts))
        }

    chunks: dict[int, Tensor] = {}
    for part in ranks.gather(encode_share):
        chunks |= part
    return torch.cat([chunks[i] for i in range(len(starts))]).to(encoder.device)


def _class_vectors(encoder: Encoder, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
    prompts = [caption(template, name) for name in classnames for template in templates]
    features = encoder.texts(prompts).view(len(classnames), len(templates), -1).mean(dim=1)
    return features / features.norm(dim=-1, keepdim=True)


def apply_subset(logits: Tensor, subset: Sequence[Sequence[int]] | None) -> Tensor:
    """Logits (B, K) of all classes -> (B, len(subset)) of the dataset's classes, in label order.

    ImageNet-A and -R hold images of 200 of the 1000 ImageNet classes; their label j is the j-th id of the subset. A
    class of ObjectNet may be several of ImageNet's; its logit is the largest of theirs.
    """
    if subset is None:
        return logits
    most = max(len(ids) for ids in subset)
    # An id that occurs twice does not change the maximum.
    padded = [[*ids, *[ids[0]] * (most - len(ids))] for ids in subset]
    return logits[:, torch.tensor(padded, device=logits.device)].amax(dim=2)


def class_logits(
    encoder: Encoder, head: Tensor, images: Tensor, subset: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Logits (B, classes of the dataset) of images (B, 3, H, W) against a classifier head (K, D)."""
    return apply_subset(LOGIT_SCALE * encoder.images(images) @ head.T, subset)
