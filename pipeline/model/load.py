"""A model by its name: a CLIP of open_clip, or a ViT of timm if the name begins with "timm:"."""

from __future__ import annotations

from pipeline.config import ConfigError, is_vit
from pipeline.model.clip import Clip, load_clip
from pipeline.model.vit import Vit, load_vit

Model = Clip | Vit


def load_model(
    name: str,
    pretrained: str | None = None,
    *,
    seed: int = 0,
    classes: tuple[str, ...] | None = None,
    image_size: int | None = None,
    hollow: bool = False,
) -> Model:
    """Call `load_clip` or `load_vit`, depending on the name. classes: class names of a ViT's classifier."""
    if is_vit(name):
        return load_vit(name, pretrained, seed=seed, classes=classes, image_size=image_size)
    return load_clip(name, pretrained, seed=seed, image_size=image_size, hollow=hollow)


def as_clip(model: Model, what: str) -> Clip:
    """The model as a CLIP; ConfigError for a ViT, which has no text tower. what: the command that needs one."""
    if isinstance(model, Vit):
        raise ConfigError(f"{what}: works with a CLIP, and {model.name} has no text tower")
    return model
