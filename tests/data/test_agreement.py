"""The effect of the fast preprocessing on a model: embeddings in the same direction as the reference's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from pipeline.data.eval.batches import eval_loader
from pipeline.data.eval.wds_layout import open_eval_set, write_wds_eval
from pipeline.data.images import normalize
from pipeline.data.sources.sample import Sample
from pipeline.demo.assets import MODEL, asset, unpack
from pipeline.model.clip import load_clip


def test_embeddings_of_fast_pixels_agree_with_the_references(tmp_path: Path) -> None:
    """On enlarged photographs of the demo and its pretrained CLIP; a random CLIP would agree with anything."""
    small, samples = open_eval_set(unpack(tmp_path, "eval.tar.gz") / "eval" / "clothing"), []
    for i in range(64):
        file = tmp_path / f"{i:02d}.jpg"
        photo = Image.open(io.BytesIO(small.tars[0].read(i, "webp"))).convert("RGB")
        photo.resize((171 + i, 133), Image.Resampling.BICUBIC).save(file, quality=90)
        samples.append(Sample(file.stem, file.name, file, 0, ()))
    photos = write_wds_eval(samples, tmp_path / "photos", classnames=["c"], templates=["{c}"])
    clip = load_clip(f"local-dir:{asset(MODEL)}")
    cfg = clip.preprocess_cfg
    model: Any = clip.model.eval()

    def embed(form: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images = next(iter(eval_loader(photos, cfg, batch_size=64, workers=0, preprocessing=form))).images
        with torch.inference_mode():
            return images.int(), model.encode_image(normalize(images, cfg["mean"], cfg["std"]))

    (fast, ours), (reference, theirs) = embed("fast"), embed("reference")
    assert 0 < int((fast - reference).abs().max()) <= 2
    similarity = cosine_similarity(ours, theirs)
    assert float(similarity.min()) > 0.9999
    assert not torch.equal(ours, theirs)
