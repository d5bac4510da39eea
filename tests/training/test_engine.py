"""DeepSpeed's settings, read back from the engine, for every ZeRO stage."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import gradient_rank

from pipeline.config import Config, override
from pipeline.training.cluster.distributed import read_world
from pipeline.training.engine import (
    BUCKETS,
    build_engine,
    deepspeed_config,
    full_parameters,
    optimizer_state,
    restore_moments,
    start_process_group,
)


def config(**changes: Any) -> Config:
    settings = {f"train.{name}": value for name, value in changes.items()} | {
        "train.global_batch_size": 4,
        "data.streams": 2,
    }
    return override(Config.model_validate({"data": {"train": "shards"}}), settings)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Any]:
    """A world of one, left without a trace for other tests of this process: DeepSpeed keeps its groups for good."""
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    world = read_world({})
    start_process_group(world)
    yield world
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    for name, value in list(vars(groups).items()):
        if isinstance(value, torch.distributed.ProcessGroup):
            setattr(groups, name, None)
    comm.cdb = None
    torch.distributed.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def engine_of(world: Any, **changes: Any) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8))
    groups = [{"params": list(model.parameters()), "names": [], "peak_lr": 0.1, "lr": 0.1, "weight_decay": 0.0}]
    return build_engine(model, groups, config(**changes), world), model


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_engine_neither_times_nor_norms_nor_hoards(one_rank: Any, stage: int) -> None:
    engine, _ = engine_of(one_rank, zero_stage=stage)
    trained = 32 * 64 + 64 + 64 * 8 + 8
    assert not engine.tput_timer.config.enabled
    assert engine.gradient_clipping() == 0
    assert engine.zero_reduce_bucket_size() == trained // BUCKETS
    assert engine.zero_overlap_comm() is False
    if stage in (1, 2):
        assert engine.optimizer.compute_grad_norm is False
    if stage == 3:
        assert engine.zero_param_persistence_threshold() == 100_000
    assert engine.skipped_steps == 0


def test_one_rank_alone_sums_no_gradients_over_ranks(one_rank: Any) -> None:
    engine, model = engine_of(one_rank, zero_stage=0)
    engine.backward(engine(torch.ones(4, 32)).square().mean())
    reference = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8))
    reference.load_state_dict(model.state_dict())
    reference(torch.ones(4, 32)).square().mean().backward()
    assert not engine.enable_backward_allreduce
    for own, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert own.grad is not None
        assert torch.equal(own.grad, expected.grad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("stage", "alone"), [(0, 0), (1, 0), (2, 0), (3, 3)])
def test_one_rank_alone_has_nobody_to_share_its_state_with(stage: int, alone: int) -> None:
    train = config(zero_stage=stage).train
    assert (train.stage(ranks=1), train.stage(ranks=2)) == (alone, stage)


def test_a_rank_starts_without_the_compiler(fork_server: Any) -> None:
    """DeepSpeed would load it for the kernels of an optimizer that is not used: most of the CPU time of a start."""
    rank = fork_server.Process(target=gradient_rank.start_alone)
    rank.start()
    rank.join(200)
    assert rank.exitcode == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_a_clipped_run_keeps_its_norm_and_counts_what_it_skips(one_rank: Any, stage: int) -> None:
    engine, model = engine_of(one_rank, zero_stage=stage, grad_clip=1.0)
    assert engine.optimizer.compute_grad_norm is True
    before = [parameter.detach().clone() for parameter in model.parameters()]
    engine.backward(engine(torch.full((4, 32), float("inf"))).sum())
    engine.step()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)) == bool(
        engine.skipped_steps
    )


def test_several_ranks_reduce_while_the_backward_goes_on() -> None:
    world = dataclasses.replace(read_world({}), world_size=2)
    settings = deepspeed_config(config(zero_stage=2), world, trained=1000)
    assert settings["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 250,
        "overlap_comm": True,
        "compute_grad_norm": False,
    }


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_fused_optimizer_goes_on_from_its_moments(one_rank: Any, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer of a GPU, which torch has for a CPU as well: resumed, it takes the step of one that went on."""
    import deepspeed  # before the patch, because it derives from AdamW

    fused = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **options: fused(groups, **{**options, "fused": True}))
    monkeypatch.setattr("pipeline.training.engine._MOMENTS", {fused: ("exp_avg", "exp_avg_sq")})

    def step(engine: Any, seed: int) -> None:
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
        engine.backward(engine(x).square().mean())
        engine.step()

    def values(model: nn.Module) -> list[torch.Tensor]:
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return [parameter.detach().clone() for parameter in model.parameters()]

    whole, model = engine_of(one_rank, zero_stage=stage)
    for seed in range(3):
        step(whole, seed)
    first, begun = engine_of(one_rank, zero_stage=stage)
    for seed in range(2):
        step(first, seed)
    moments = optimizer_state(first, begun.named_parameters())
    saved = values(begun)
    torch.manual_seed(0)
    again = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8))
    with torch.no_grad():
        for parameter, value in zip(again.parameters(), saved, strict=True):
            parameter.copy_(value)
    groups = [{"params": list(again.parameters()), "names": [], "peak_lr": 0.1, "lr": 0.1, "weight_decay": 0.0}]
    second = build_engine(again, groups, config(zero_stage=stage), one_rank)
    restore_moments(second, again.named_parameters(), moments)
    step(second, 2)
    for mine, theirs in zip(values(again), values(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("at_once", [100, 10**9])
def test_state_in_few_copies_is_that_of_each_parameter(
    one_rank: Any, stage: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what DeepSpeed's own functions give, one parameter after another."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    monkeypatch.setattr("pipeline.training.device.AT_ONCE", at_once)
    engine, model = engine_of(one_rank, zero_stage=stage)
    for seed in range(2):
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
        engine.backward(engine(x).square().mean())
        engine.step()
    named = list(model.named_parameters())
    values, moments = full_parameters(named), optimizer_state(engine, named)
    assert list(values) == [name for name, _ in named]
    assert moments.pop("step").tolist() == [2.0]
    assert len(moments) == 2 * len(named)
    for name, parameter in named:
        value = parameter.detach() if stage == 0 else safe_get_full_fp32_param(parameter)
        assert value is not None
        assert torch.equal(values[name], value)
        for moment in ("exp_avg", "exp_avg_sq"):
            if stage == 0:
                whole = engine.basic_optimizer.state[parameter][moment]
            else:
                whole = safe_get_full_optimizer_state(parameter, moment)
            assert whole is not None
            assert torch.equal(moments[f"{name}/{moment}"], whole)
    for before in values.values():
        before.add_(1)  # a copy: nothing of it reaches the model
    assert not torch.equal(values["0.bias"], full_parameters(named)["0.bias"])
