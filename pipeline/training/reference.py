"""The reference samples of section keep, with their features from the untouched model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import Config, ConfigError
from pipeline.data.images import normalize, size_pair
from pipeline.data.reference.features import Reading, Untouched, image_features, text_features
from pipeline.data.reference.samples import Images, ReferenceData, Texts, reference_streams
from pipeline.data.reference.texts import reference_texts
from pipeline.data.shards.index import load_index
from pipeline.data.storage.cache import Cache
from pipeline.model.load import Model
from pipeline.model.text import ShortTokenizer, batch_tokenizer
from pipeline.model.vit import Vit
from pipeline.training.cluster.distributed import World
from pipeline.training.directory import say

logger = logging.getLogger("selora")
# Texts that show whether two tokenizers are the same.
_PROBE = ["a photo of a dog.", "two Zebras, crossing the street at 7:30 pm!"]


def build_reference(config: Config, model: Model, world: World) -> ReferenceData | None:
    """The reference samples of a run; None if `keep.weight` is 0.

    Args:
        model: the untouched model, without blocks.

    Raises:
        ConfigError: for reference data that cannot be used; the message names the option.
    """
    keep = config.keep
    if not keep.weight:
        return None
    streams = reference_streams(keep.batch_size, config.data.streams, world.world_size)
    size = size_pair(model.preprocess_cfg["size"])
    cache = Cache.from_environment()
    lines = None if keep.texts is None or config.classifies else reference_texts(keep.texts)
    with encoding(model, world.device) as untouched:
        images = None if keep.images is None else _images(config, untouched, cache, world, streams)
        texts = None
        if lines is not None:
            texts = Texts(lines, text_features(cache, untouched, lines), seed=config.seed, streams=streams)
    counts = [] if images is None else [f"{images.index.samples} images{' with captions' * images.captioned}"]
    counts += [] if lines is None else [f"{len(lines)} texts"]
    say(world, f"keep: held near the untouched model on {' and '.join(counts)}")
    return ReferenceData(images, texts, keep.batch_size, streams, size, _cut_of(model))


def _cut_of(model: Model) -> Callable[[Tensor], Tensor]:
    tokenizer = None if isinstance(model, Vit) else batch_tokenizer(model.model, model.tokenizer)
    return tokenizer.cut if isinstance(tokenizer, ShortTokenizer) else _whole


def _whole(tokens: Tensor) -> Tensor:
    return tokens


def _images(config: Config, untouched: Untouched, cache: Cache, world: World, streams: int) -> Images:
    assert config.keep.images is not None
    try:
        index = load_index(config.keep.images)
    except ConfigError as error:
        raise ConfigError(f"keep.images={config.keep.images}: {error}") from error
    reading = Reading(untouched.preprocess, config.data.preprocessing, config.data.max_pixels)
    first = world.local_rank * len(index.shards) // world.local_world_size
    found = image_features(cache, untouched, index, reading, workers=config.data.workers, first=first)
    images = Images(index, found, reading, seed=config.seed, streams=streams, window=config.data.shuffle_window)
    if 0 < images.uncaptioned < index.samples:
        say(world, f"warning: keep.images: {images.uncaptioned} images have no caption, so no caption is used")
    if config.keep.replay and not images.captioned:
        raise ConfigError(
            f"keep.replay={config.keep.replay:g}: {images.uncaptioned} images of keep.images={config.keep.images} have "
            "no caption; pack them with captions, or set keep.replay=0"
        )
    return images


@contextmanager
def encoding(model: Model, device: torch.device) -> Iterator[Untouched]:
    """The model ready to encode, in fp32 on `device`; afterwards its mode and device are restored."""
    net, cfg = model.model, model.preprocess_cfg
    trained, place = net.training, next(net.parameters()).device
    net.eval().to(device)

    @torch.no_grad()
    def images(pixels: Tensor) -> Tensor:
        return _unit(net.encode_image(normalize(pixels.to(device), cfg["mean"], cfg["std"])))  # pyright: ignore

    @torch.no_grad()
    def texts(tokens: Tensor) -> Tensor:
        return _unit(net.encode_text(tokens.to(device)))  # pyright: ignore

    try:
        if isinstance(model, Vit):
            yield Untouched(images, None, None, cfg, (model.digest, model.name, _text(cfg)))
        else:
            probe = model.tokenizer(_PROBE).tolist()
            identity = (model.digest, _text(model.model_cfg), _text(cfg), probe)
            yield Untouched(images, texts, model.tokenizer, cfg, identity)
    finally:
        net.train(trained).to(place)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1).cpu()


def _text(values: object) -> str:
    return json.dumps(values, sort_keys=True, default=str)
