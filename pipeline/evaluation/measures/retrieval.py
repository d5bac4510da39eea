"""Image-text retrieval both ways, with any number of captions per image.

The whole similarity matrix is never in memory: it is computed in chunks of rows, shared by the ranks, and of each chunk
only the first ten columns are kept. For COCO's 5,000 x 25,010 that is 26 MB at a time instead of 500 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.evaluation.measures.encode import Encoder
from pipeline.evaluation.measures.metrics import RECALL_K, RecallCounts
from pipeline.evaluation.measures.ranks import Ranks

QUERIES_PER_CHUNK = 256


@dataclass
class Embeddings:
    """Unit vectors of images (N, D) and of their texts (M, D), fp32 on the CPU; owner[j] is the image of text j."""

    images: Tensor
    texts: Tensor
    owner: Tensor


def embed_batch(encoder: Encoder, images: Tensor, captions: Sequence[Sequence[str]]) -> Embeddings:
    """Embed one batch of images (B, 3, H, W) and the captions of each; owners count from 0 in this batch."""
    texts = [text for own in captions for text in own]
    owner = torch.tensor([i for i, own in enumerate(captions) for _ in own], dtype=torch.int64)
    image_features = encoder.images(images).cpu()
    text_features = encoder.texts(texts).cpu() if texts else image_features.new_zeros(0, image_features.shape[1])
    return Embeddings(image_features, text_features, owner)


def join(batches: Iterable[Embeddings]) -> Embeddings:
    """Concatenate batches in the order of the dataset."""
    parts = list(batches)
    owners, start = [], 0
    for part in parts:
        owners.append(part.owner + start)
        start += len(part.images)
    return Embeddings(torch.cat([p.images for p in parts]), torch.cat([p.texts for p in parts]), torch.cat(owners))


def recall_counts(
    queries: Tensor,
    gallery: Tensor,
    query_owner: Tensor,
    gallery_owner: Tensor,
    ranks: Ranks,
    device: torch.device,
) -> RecallCounts:
    """Count the queries (Q, D) with a gallery item (G, D) of the same owner among the first k.

    A gallery with fewer than k items counts as a whole. The counts are those of all ranks.
    """
    starts = range(0, len(queries), QUERIES_PER_CHUNK)
    gallery, gallery_owner = gallery.to(device), gallery_owner.to(device)

    def count_share() -> RecallCounts:
        parts = [RecallCounts()]
        for i in ranks.share(len(starts)):
            rows = slice(starts[i], starts[i] + QUERIES_PER_CHUNK)
            scores = queries[rows].to(device) @ gallery.T
            first = scores.topk(min(max(RECALL_K), len(gallery)), dim=1).indices
            found = gallery_owner[first] == query_owner[rows].to(device)[:, None]
            parts.append(RecallCounts(tuple(int(found[:, :k].any(dim=1).sum()) for k in RECALL_K), len(scores)))
        return RecallCounts.total(parts)

    return RecallCounts.total(ranks.gather(count_share))


def recall_both_ways(embeddings: Embeddings, ranks: Ranks, device: torch.device) -> tuple[RecallCounts, RecallCounts]:
    """(image -> text, text -> image) counts over all queries."""
    images, texts, owner = embeddings.images, embeddings.texts, embeddings.owner
    own = torch.arange(len(images))
    image_to_text = recall_counts(images, texts, own, owner, ranks, device)
    text_to_image = recall_counts(texts, images, owner, own, ranks, device)
    return image_to_text, text_to_image
