"""The computed cost of training at scale: network bytes, memory per rank, cores and bandwidth for the images.

Every number follows from the shapes of the two towers, the adapter and the ZeRO stage by the formulas below; nothing
here is measured. docs/scaling.md is printed from this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.costs.goodput import Job

# Weights are stored in fp32 and cast for the matrix products, also with model.precision=bf16.
WEIGHT_BYTES = 4
MOMENT_BYTES = 8  # both of AdamW
CAPTION_TOKENS = 16  # tokens of the longest caption in a batch of short sentences
WIDE_BYTES = 4  # tensors that stay fp32 under autocast: the inputs of norms and layers, features, logits
_MB, _GB = 1e6, 1e9


@dataclass(frozen=True)
class Recompute:
    """The recomputation in a step to save memory: train.micro_batch_size and train.activation_checkpointing."""

    micro_batch: int | None = None
    layers: bool = False

    def pairs(self, images: int) -> int:
        """Number of pairs among a rank's `images` that the towers keep at a time."""
        return min(images, self.micro_batch or images)

    def passes(self, images: int) -> int:
        """Passes over the towers in a step: forward, backward, and one more for each recomputation."""
        return 2 + (self.pairs(images) < images) + self.layers


PLAIN = Recompute()


@dataclass(frozen=True)
class Tower:
    """One transformer. `outside`: parameters outside the layers (embeddings, projection, outer norms)."""

    layers: int
    width: int
    mlp: int
    heads: int
    tokens: int
    outside: int

    @property
    def layer_parameters(self) -> int:
        """q, k, v, out, fc1, fc2 with biases, and two norms."""
        w, m = self.width, self.mlp
        return 4 * w * (w + 1) + w * m + m + m * w + w + 4 * w

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.outside

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward over one image or text, attention products included."""
        return (
            self.layers * self.tokens * (4 * self.width**2 + 2 * self.width * self.mlp + 2 * self.tokens * self.width)
        )

    def adapter_parameters(self, rank: int, *, dora: bool = False) -> int:
        """A and B of the six blocks of every layer, their gates' scores, and with DoRA a magnitude per output."""
        w, m = self.width, self.mlp
        pairs = 4 * rank * 2 * w + 2 * rank * (w + m)
        return self.layers * (pairs + 6 + (5 * w + m if dora else 0))

    def activation_bytes(self, pairs: int, bytes_each: int, *, recompute: bool = False) -> int:
        """Bytes that all layers keep for the backward pass of `pairs`, without attention maps (fused attention).

        Per layer and token: the inputs of the two norms, of q/k/v, of out and of fc1, the outputs of q, k and v, and
            the hidden layer of the MLP before and after its activation; adapters need these inputs for their gradients,
            frozen weights would not. Per layer also the six weights in effect. `recompute`: only the inputs of the
            layers, and everything of one layer.
        """
        rows, weights = pairs * self.tokens, 4 * self.width**2 + 2 * self.width * self.mlp
        values = rows * (6 * self.width + 2 * self.mlp) + weights
        layer = values * bytes_each + rows * 2 * self.width * WIDE_BYTES
        if recompute:
            return layer + self.layers * rows * self.width * WIDE_BYTES
        return self.layers * layer


@dataclass(frozen=True)
class Shape:
    """A CLIP, whose two towers end in vectors of `embed` numbers, or a ViT under a classifier, without text."""

    name: str
    image: Tower
    text: Tower | None
    embed: int

    @property
    def towers(self) -> tuple[Tower, ...]:
        return (self.image,) if self.text is None else (self.image, self.text)

    @property
    def layers(self) -> int:
        return sum(tower.layers for tower in self.towers)

    @property
    def parameters(self) -> int:
        """Number of parameters, including the logit scale of a CLIP."""
        return sum(tower.parameters for tower in self.towers) + (self.text is not None)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one pair, or of one image."""
        return sum(tower.macs for tower in self.towers)

    def with_captions(self, tokens: int = CAPTION_TOKENS) -> Shape:
        """The same shape for texts of this many tokens: a batch is cut to its longest caption."""
        return self if self.text is None else replace(self, text=replace(self.text, tokens=tokens))

    def activation_bytes(self, images: int, ranks: int, bytes_each: int, recompute: Recompute = PLAIN) -> int:
        """Bytes that a rank with `images` keeps in a step: both towers of the pairs at a time, all features, logits."""
        from pipeline.method.contrastive import MOST_LOGITS

        pairs = recompute.pairs(images)
        towers = (tower.activation_bytes(pairs, bytes_each, recompute=recompute.layers) for tower in self.towers)
        if self.text is None:
            return sum(towers)
        every = images * ranks
        loss = (2 * images + every) * self.embed + min(images * every, MOST_LOGITS)
        return sum(towers) + loss * WIDE_BYTES

    def trained(self, rank: int, *, rest: bool = False, dora: bool = False) -> int:
        """Number of trained parameters; `rest`: including those outside the layers (train.train_rest=all)."""
        adapters = sum(tower.adapter_parameters(rank, dora=dora) for tower in self.towers)
        return adapters + (sum(tower.outside for tower in self.towers) + (self.text is not None) if rest else 0)


def clip_shape(
    name: str,
    embed: int,
    image: tuple[int, int, int, int, int],
    text: tuple[int, int, int],
    *,
    pixels: int = 224,
    context: int = 77,
    vocabulary: int = 49408,
) -> Shape:
    """A CLIP's shape by open_clip's numbers: image (layers, width, mlp, heads, patch), text (layers, width, heads)."""
    layers, width, mlp, heads, patch = image
    grid = (pixels // patch) ** 2
    outside = 3 * patch**2 * width + width + (grid + 1) * width + 4 * width + width * embed
    text_layers, text_width, text_heads = text
    text_outside = (vocabulary + context + 2 + embed) * text_width
    return Shape(
        name,
        Tower(layers, width, mlp, heads, grid + 1, outside),
        Tower(text_layers, text_width, 4 * text_width, text_heads, context, text_outside),
        embed,
    )


def vit_shape(name: str) -> Shape:
    """The shape of a ViT by its `timm:` name; further parameters of its layers are counted as outside them."""
    from pipeline.model.vit import vit_layout

    layout = vit_layout(name)
    plain = Tower(layout.layers, layout.width, layout.mlp, layout.heads, layout.tokens, 0)
    return Shape(name, replace(plain, outside=layout.parameters - plain.parameters), None, 0)


def shape_of(name: str, model_cfg: Mapping[str, Any]) -> Shape | None:
    """The shape of an open_clip architecture; None if a tower is not open_clip's own transformer."""
    image, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if not all(isinstance(image.get(key), int) for key in ("layers", "width", "patch_size", "image_size")):
        return None
    if not all(isinstance(text.get(key), int) for key in ("layers", "width", "heads")):
        return None
    width = image["width"]
    mlp, heads = int(width * image.get("mlp_ratio", 4.0)), width // image.get("head_width", 64)
    return clip_shape(
        name,
        model_cfg["embed_dim"],
        (image["layers"], width, mlp, heads, image["patch_size"]),
        (text["layers"], text["width"], text["heads"]),
        pixels=image["image_size"],
        context=text.get("context_length", 77),
        vocabulary=text.get("vocab_size", 49408),
    )


SHAPES = {
    "ViT-B-16": clip_shape("ViT-B-16", 512, (12, 768, 3072, 12, 16), (12, 512, 8)),
    "ViT-L-14": clip_shape("ViT-L-14", 768, (24, 1024, 4096, 16, 14), (12, 768, 12)),
    "ViT-bigG-14": clip_shape("ViT-bigG-14", 1280, (48, 1664, 8192, 16, 14), (32, 1280, 20)),
}


def gradient_traffic(stage: int, total: int, trained: int, ranks: int) -> float:
    """Bytes that one rank sends in a step for weights and gradients, with ring collectives.

    Stage 0 sums the gradients of the trained parameters by an all-reduce, which moves them twice. DeepSpeed's stages 1
    and 2 do the same, each rank keeps its part, and the new values are gathered. Stage 3 keeps nothing whole: all
    weights, including the frozen ones, are gathered in the forward and again in the backward pass.
    """
    share = (ranks - 1) / ranks
    moved = {0: 2 * trained, 1: 3 * trained, 2: 3 * trained}.get(stage, 2 * total + trained)
    return moved * WEIGHT_BYTES * share


def contrastive_traffic(batch: int, embed: int, ranks: int) -> float:
    """Bytes that one rank sends in a step for the loss over the global `batch`, with ring collectives, in fp32.

    The texts' embeddings are gathered and their gradients return by an all-reduce; the images stay on their ranks, and
    instead every rank sends the others a log-sum-exp for each text.
    """
    share, size = (ranks - 1) / ranks, batch * embed * 4
    return size * share + 2 * size * share + batch * 4 * (ranks - 1)


def loss_traffic(shape: Shape, batch: int, ranks: int) -> float:
    """Bytes that one rank sends in a step for the loss; a classifier's loss needs only the rank's own images."""
    return 0.0 if shape.text is None else contrastive_traffic(batch, shape.embed, ranks)


def rank_memory(
    shape: Shape,
    stage: int,
    ranks: int,
    *,
    trained: int,
    images: int,
    activation_bytes: int = 2,
    recompute: Recompute = PLAIN,
) -> float:
    """Bytes on one rank: weights, gradients, AdamW, fp32 masters (stages 1 to 3 keep them apart), activations.

    Stage 1 partitions the optimizer's state, stage 2 also the gradients, stage 3 also the weights. `images`: the rank's
    own images in a step.
    """
    whole, part = trained * WEIGHT_BYTES, trained * WEIGHT_BYTES / ranks
    weights = shape.parameters * WEIGHT_BYTES / (ranks if stage == 3 else 1)
    gathered = 2 * shape.image.layer_parameters * WEIGHT_BYTES if stage == 3 else 0
    gradients = whole if stage < 2 else part
    optimizer = trained * MOMENT_BYTES if stage == 0 else trained * MOMENT_BYTES / ranks + part
    activations = shape.activation_bytes(images, ranks, activation_bytes, recompute)
    return weights + gathered + gradients + optimizer + activations


# Dense bf16 FLOPS of an H100, and the share of them that a compiled step is assumed to reach.
PEAK, MFU = 989e12, 0.33


@dataclass(frozen=True)
class Hardware:
    """A node: `flops` is the rate of one card in matrix products, `link_gbit` the bandwidth of the node's network."""

    cards: int = 8
    flops: float = MFU * PEAK
    link_gbit: float = 400.0
    latency_s: float = 15e-6
    inside_gbyte: float = 300.0


def step_flops(shape: Shape, images: int, recompute: Recompute = PLAIN) -> int:
    """FLOPs of one rank in a step. A backward that skips the gradients of frozen weights costs as much as a forward."""
    return 2 * shape.macs * images * recompute.passes(images)


def step_seconds(shape: Shape, images: int, machine: Hardware) -> float:
    """Computing time of a step."""
    return step_flops(shape, images) / machine.flops


def communication_seconds(
    shape: Shape, stage: int, ranks: int, *, trained: int, images: int, machine: Hardware
) -> float:
    """Time of a step's collectives without overlap: a ring passes each node's link once, plus its hops."""
    traffic = gradient_traffic(stage, shape.parameters, trained, ranks)
    traffic += loss_traffic(shape, images * ranks, ranks)
    inside = ranks <= machine.cards
    rate = machine.inside_gbyte * _GB if inside else machine.link_gbit / 8 * _GB
    rounds = 6 if stage < 3 else 6 + 2 * shape.layers
    nodes = max(1, ranks // machine.cards)
    return traffic / rate + rounds * (machine.cards + nodes) * machine.latency_s


def efficiency(shape: Shape, stage: int, nodes: int, *, trained: int, images: int, machine: Hardware) -> float:
    """Share of the time spent computing, without any overlap: a lower bound."""
    compute = step_seconds(shape, images, machine)
    waits = communication_seconds(shape, stage, nodes * machine.cards, trained=trained, images=images, machine=machine)
    return compute / (compute + waits)


def loader_cores(images_per_second: float, milliseconds_each: float) -> float:
    """Cores that decode the images of one card."""
    return images_per_second * milliseconds_each / 1000


def store_gbit(images_per_second: float, bytes_each: float) -> float:
    """Gbit/s from the object store when nothing is cached."""
    return images_per_second * bytes_each * 8 / _GB


def checkpoint_job(step_s: float, trained: int, node_bytes: float = 0.0) -> Job:
    """A run whose checkpoints hold each trained number and its two moments: copied at 10 GB/s, written at 1 GB/s."""
    size = trained * (WEIGHT_BYTES + MOMENT_BYTES)
    copy = 0.2 + size / (10 * _GB)
    return Job(step_s, node_bytes, copy, copy + 0.5 + size / _GB)
