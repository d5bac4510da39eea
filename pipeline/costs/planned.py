"""The cost of a planned training, in a few lines for `selora sweep --plan`."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import Config
from pipeline.costs.goodput import Nodes, recommend, simulate
from pipeline.costs.scale import (
    PLAIN,
    Hardware,
    Recompute,
    Shape,
    checkpoint_job,
    communication_seconds,
    gradient_traffic,
    loss_traffic,
    rank_memory,
    shape_of,
    step_flops,
    vit_shape,
)

_MB, _GB = 1e6, 1e9


def planned(configs: Sequence[Config], ranks: int) -> str:
    """`describe` for the trial with the most trained parameters; empty if no formula here applies."""
    adapted = [one for one in configs if one.adapter.kind in ("lora", "dora")]
    if not adapted:
        return ""
    config = max(adapted, key=lambda one: one.adapter.rank)
    shape = _shape_of_config(config)
    if shape is None:
        return ""
    return describe(
        shape.with_captions(),
        stage=config.train.stage(ranks),
        ranks=ranks,
        global_batch=config.train.global_batch_size,
        reference=config.keep.batch_size if config.keep.weight else 0,
        checkpoint_every=config.train.checkpoint_every,
        rank=config.adapter.rank,
        rest=config.train.train_rest == "all",
        dora=config.adapter.kind == "dora",
        precision=config.model.precision,
        recompute=Recompute(config.train.micro_batch_size, config.train.activation_checkpointing),
    )


def _shape_of_config(config: Config) -> Shape | None:
    from pipeline.model.clip import model_config

    if config.classifies:
        return None if ":" in config.model.name.removeprefix("timm:") else vit_shape(config.model.name)
    model_cfg = model_config(config.model.name)
    if config.model.image_size is not None:
        model_cfg["vision_cfg"]["image_size"] = config.model.image_size
    return shape_of(config.model.name, model_cfg)


def describe(
    shape: Shape,
    *,
    stage: int,
    ranks: int,
    global_batch: int,
    reference: int,
    checkpoint_every: int,
    rank: int,
    rest: bool,
    dora: bool,
    precision: str,
    recompute: Recompute,
) -> str:
    """A few lines about a planned training, for `selora sweep --plan`."""
    trained = shape.trained(rank, rest=rest, dora=dora)
    images = max(1, global_batch // ranks) + -(-reference // ranks)
    each = 2 if precision == "bf16" else 4
    memory = rank_memory(
        shape, stage, ranks, trained=trained, images=images, activation_bytes=each, recompute=recompute
    )

    def moved(ranks: int) -> tuple[float, float]:
        weights = gradient_traffic(stage, shape.parameters, trained, ranks)
        return weights / _MB, loss_traffic(shape, global_batch, ranks) / _MB

    weights, loss = moved(ranks)
    more = [2**power * ranks for power in range(1, 5)]
    volumes = ", ".join(f"{sum(moved(number)):.1f}" for number in more)
    return (
        f"on paper, for rank {rank}:\n"
        f"  a step moves {weights:.1f} MB per rank for ZeRO-{stage} and {loss:.1f} MB for the loss\n"
        f"  on {', '.join(map(str, more))} ranks with the same global batch: {volumes} MB\n"
        f"  a rank holds {memory / _GB:.1f} GB with {images} images{_of_these(reference, ranks)} and {precision} "
        f"activations{_kept(recompute, images)}\n"
        f"  a step computes {step_flops(shape, images, recompute) / 1e12:.3g} TFLOP per rank"
        f"{_again(recompute, images)}\n"
        f"  {checkpoint_advice(shape, stage, ranks, trained, images, recompute, checkpoint_every)}\n"
        f"  {trained / 1e6:.2f} M of {shape.parameters / 1e6:.1f} M parameters train"
    )


def checkpoint_advice(
    shape: Shape, stage: int, ranks: int, trained: int, images: int, recompute: Recompute, every: int
) -> str:
    """The best checkpoint interval, and the goodput of the given one, for nodes of H100s."""
    machine = Hardware()
    step = step_flops(shape, images, recompute) / machine.flops
    step += communication_seconds(shape, stage, ranks, trained=trained, images=images, machine=machine)
    cluster = Nodes(nodes=max(1, -(-ranks // machine.cards)))
    job = checkpoint_job(step, trained)
    best, given = recommend(job, cluster), simulate(job, cluster, every)
    return (
        f"a checkpoint every {best.every:,} steps ({best.every * step / 60:.2g} min) keeps {best.share:.2%} of the time"
        f" on {cluster.nodes} nodes of {machine.cards} H100s; train.checkpoint_every={every} keeps {given.share:.2%}"
    )


def _of_these(reference: int, ranks: int) -> str:
    return f", {-(-reference // ranks)} of them reference samples," if reference else ""


def _kept(recompute: Recompute, images: int) -> str:
    parts = [f"{recompute.pairs(images)} of them at a time"] if recompute.pairs(images) < images else []
    parts += ["one layer at a time"] if recompute.layers else []
    return "".join(f", {part}" for part in parts)


def _again(recompute: Recompute, images: int) -> str:
    passes, plain = recompute.passes(images), PLAIN.passes(images)
    return f": {passes} passes instead of {plain}, so {passes / plain - 1:.0%} more hours" if passes > plain else ""
