"""Gradients that DeepSpeed hands to the optimizer with reference samples in the step: run in every rank of a test."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from gradient_rank import BATCH, inputs

REFERENCE = 8
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "micro": {"micro_batch_size": 2},
    "layers": {"activation_checkpointing": True},
    "compiled": {"compile": True},
    "class": {"positives": "class"},
}


def reference(rank: int, world: int) -> Any:
    """This rank's share of eight reference images with captions and eight more texts, shorter than the captions."""
    from pipeline.data.reference.samples import Reference

    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (REFERENCE, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, 59, (2, REFERENCE, 6), generator=generator)
    tokens[:, :, 5] = 59
    image, text = (torch.randn(*shape, 32, generator=generator) for shape in ((REFERENCE,), (2, REFERENCE)))
    share = slice(rank * REFERENCE // world, (rank + 1) * REFERENCE // world)
    return Reference(
        images[share],
        F.normalize(image[share], dim=-1),
        tokens[:, share].flatten(0, 1),
        F.normalize(text[:, share], dim=-1).flatten(0, 1),
    )


def gradients(folder: str, kind: str, stage: int, precision: str, way: str) -> dict[str, Tensor]:
    """Losses and whole gradients, averaged over ranks, of one step."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    from pipeline.config import Config
    from pipeline.method.adapter import blocks
    from pipeline.model.towers import inside_layers
    from pipeline.training.cluster.distributed import read_world
    from pipeline.training.engine import build_engine, set_learning_rates
    from pipeline.training.model import attach_blocks, layer_classes, load_untouched, objective_of, trainable
    from pipeline.training.optim import Rates, parameter_groups

    config = Config.model_validate(
        {
            "model": {"name": f"local-dir:{folder}", "precision": precision},
            "adapter": {"kind": kind, "rank": 3},
            "train": {"global_batch_size": BATCH, "zero_stage": stage, "lr": 0.01, **WAYS[way]},
            "data": {"train": "unused", "streams": 1},
            "keep": {"weight": 3.0, "images": "unused", "replay": 0.5},
        }
    )
    clip = attach_blocks(config, load_untouched(config))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for block in blocks(clip.model).values():
            block.lowrank.lora_B.normal_(std=0.1, generator=generator)
    groups = parameter_groups(trainable(clip.model), inside_layers, Rates(0.01, 0.01, 0.01), 0.1)
    compiled = config.train.compile is True
    classes = layer_classes(clip) if compiled else []
    engine = build_engine(objective_of(config, clip, compiled), groups, config, read_world(), classes)
    named, rank, world = trainable(clip.model), dist.get_rank(), dist.get_world_size()
    labels = (torch.arange(BATCH) % 5)[rank * BATCH // world : (rank + 1) * BATCH // world]
    set_learning_rates(engine, 0.0)
    batch = *inputs(rank, world), 0, reference(rank, world), labels if way == "class" else None
    # A step that changes nothing, then the drift, as in a run: nothing of them may stay in the step that is compared.
    engine.backward(engine(*batch)["total"])
    engine.step()
    with torch.no_grad():
        drift = engine(None, None, 0, reference(0, 1))
    losses = engine(*batch)
    engine.backward(losses["total"])
    found = {}
    for name, parameter in named:
        grad = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
        assert grad is not None, name
        found[name] = grad.detach().float().clone()
    engine.step()
    for name in ("total", "keep", "replay"):
        total = losses[name].detach().clone()
        dist.all_reduce(total)
        found[f"loss/{name}"] = total / world
    return found | {f"loss/{name}": value for name, value in drift.items()}


def main(rank: int, world: int, port: int, folder: str, cases: list[tuple[Any, ...]], out: Path) -> None:
    """Rank 0 writes NUMBER.pt for every case."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, world, world, "127.0.0.1", port)), strict=True))
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for number, case in enumerate(cases):
        result = gradients(folder, *case)
        if rank == 0:
            torch.save(result, out / f"{number}.pt")
    dist.barrier()
    os._exit(0)  # what DeepSpeed leaves behind must not hold up the exit
