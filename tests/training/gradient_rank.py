"""Gradients that DeepSpeed hands to the optimizer, for several ways to compute a step: run in every rank of a test."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BATCH = 12
CLOSED = (1, 7)  # of the 24 blocks
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "micro": {"micro_batch_size": 4},  # 4 + 2 of the 6 pairs that a rank of 2 has
    "layers": {"activation_checkpointing": True},
    "both": {"micro_batch_size": 1, "activation_checkpointing": True},
    "compiled": {"compile": True},
    "all": {"micro_batch_size": 4, "activation_checkpointing": True, "compile": True},
}


def inputs(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """This rank's share of one fixed batch: uint8 images and tokens."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, 59, (BATCH, 8), generator=generator)
    tokens[:, 5] = 59
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    return images[share], tokens[share]


def prepared(folder: str, precision: str, stage: int, way: dict[str, Any], kind: str = "dora") -> tuple[Any, Any, Any]:
    """Config, CLIP and objective with B away from zero and two gates closed."""
    from pipeline.config import Config
    from pipeline.method.adapter import blocks
    from pipeline.training.model import attach_blocks, load_untouched, objective_of

    config = Config.model_validate(
        {
            "model": {"name": f"local-dir:{folder}", "precision": precision},
            "adapter": {"kind": kind, "rank": 3},
            "train": {"global_batch_size": BATCH, "zero_stage": stage, "lr": 0.01, **way},
            "data": {"train": "unused", "streams": 1},
        }
    )
    clip = attach_blocks(config, load_untouched(config))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for number, block in enumerate(blocks(clip.model).values()):
            block.lowrank.lora_B.normal_(std=0.1, generator=generator)
            assert block.gate is not None
            block.gate.score.fill_(0.05 if number in CLOSED else 0.15)
    return config, clip, objective_of(config, clip, config.train.compile is True)


def gradients(folder: str, precision: str, stage: int, way: dict[str, Any]) -> dict[str, Tensor]:
    """Loss and whole gradients, averaged over ranks, of one step under DeepSpeed; then the step itself is taken."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    from pipeline.model.towers import inside_layers
    from pipeline.training.cluster.distributed import read_world
    from pipeline.training.engine import build_engine, full_parameters, set_learning_rates
    from pipeline.training.model import layer_classes, trainable
    from pipeline.training.optim import Rates, parameter_groups

    config, clip, objective = prepared(folder, precision, stage, way)
    groups = parameter_groups(trainable(clip.model), inside_layers, Rates(0.01, 0.01, 0.01), 0.1)
    engine = build_engine(
        objective, groups, config, read_world(), layer_classes(clip) if config.train.compile is True else []
    )
    named = trainable(clip.model)
    found = {}
    for step in range(2):
        # the first step moves nothing, so that the second shows what the first may have left in any buffer
        set_learning_rates(engine, float(step))
        losses = engine(*inputs(dist.get_rank(), dist.get_world_size()), step)
        engine.backward(losses["total"])
        for name, parameter in named:
            grad = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
            assert grad is not None, name
            found[f"{step}/{name}"] = grad.detach().float().clone()
        engine.step()
        total = losses["total"].detach().clone()
        dist.all_reduce(total)
        found[f"{step}/loss"] = total / dist.get_world_size()
    return found | {f"after/{name}": value for name, value in full_parameters(named).items()}


def start_alone() -> None:
    """Build an engine in a world of one, and exit with 1 if that loaded torch's compiler."""
    from pipeline.config import Config
    from pipeline.training.cluster.distributed import read_world
    from pipeline.training.engine import build_engine, start_process_group

    world = read_world({})
    start_process_group(world)
    model = torch.nn.Linear(4, 4)
    groups = [{"params": list(model.parameters()), "names": [], "peak_lr": 0.1, "lr": 0.1, "weight_decay": 0.0}]
    config = Config.model_validate({"data": {"train": "unused"}, "train": {"zero_stage": 1}})
    build_engine(model, groups, config, world)
    os._exit("torch._inductor.compile_fx" in sys.modules)


def main(rank: int, world: int, port: int, folder: str, cases: list[tuple[str, int, str]], out: Path) -> None:
    """Rank 0 writes WAY-STAGE-PRECISION.pt for every case."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, world, world, "127.0.0.1", port)), strict=True))
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for way, stage, precision in cases:
        result = gradients(folder, precision, stage, WAYS[way])
        if rank == 0:
            torch.save(result, out / f"{way}-{stage}-{precision}.pt")
    dist.barrier()
    os._exit(0)  # what DeepSpeed leaves behind must not hold up the exit
