"""What only a card can show; skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from pipeline.config import Config, override
from pipeline.evaluation.measures.knn import Nearest
from pipeline.method.adapter import attach_adapter, blocks
from pipeline.model.activation import QuickGELU
from pipeline.training.cluster.distributed import read_world
from pipeline.training.device import on_device
from pipeline.training.engine import build_engine, start_process_group
from pipeline.training.loop import Inputs

pytestmark = pytest.mark.gpu


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, an operation at which the host waits for the card is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def network(kind: str, score: float) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 48), QuickGELU(), nn.Linear(48, 32))
    attach_adapter({str(i): (net, str(i)) for i in (0, 2)}, rank=4, kind=kind)  # pyright: ignore[reportArgumentType]
    for block in blocks(net).values():
        nn.init.normal_(block.lowrank.lora_B, std=0.1)
        assert block.gate is not None
        nn.init.constant_(block.gate.score, score)
    return net


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("score", [0.2, 0.05])
def test_a_step_waits_for_nothing_and_is_that_of_a_cpu(kind: str, score: float) -> None:
    x = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(1))
    own, reference, there = network(kind, score).cuda(), network(kind, score), x.cuda()
    own(there).square().sum().backward()  # cuBLAS waits when it starts
    own.zero_grad()
    with no_waiting():
        own(there).square().sum().backward()
    reference(x).square().sum().backward()
    for (name, got), expected in zip(own.named_parameters(), reference.parameters(), strict=True):
        if expected.grad is not None:
            assert got.grad is not None
            torch.testing.assert_close(got.grad.cpu(), expected.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("stage", [0, 3])
def test_buffers_follow_the_parameters_to_the_card(stage: int) -> None:
    """DeepSpeed moves them with the model, except under ZeRO-3."""
    world = read_world({})
    start_process_group(world)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    groups = [{"params": list(net.parameters()), "names": [], "peak_lr": 0.1, "lr": 0.1, "weight_decay": 0.0}]
    settings = {"train.zero_stage": stage, "train.global_batch_size": 4, "data.streams": 2}
    engine = build_engine(net, groups, override(Config.model_validate({"data": {"train": "shards"}}), settings), world)
    engine.backward(engine(torch.randn(4, 8, device="cuda")).square().sum())
    engine.step()
    assert all(buffer.is_cuda for buffer in net.buffers())


def test_batches_arrive_whole_from_the_side_stream() -> None:
    """A copy that a step reads too early, or whose memory is given away too early, shows as a wrong sum."""
    batches = [torch.full((1 << 20,), n, dtype=torch.int32).pin_memory() for n in range(8)]
    busy = torch.randn(2048, 2048, device="cuda")
    sums = []
    for _, moved in on_device(batches, lambda batch: Inputs(batch, batch[:4]), torch.device("cuda")):
        busy = (busy @ busy).tanh()
        sums.append(moved.images.sum())
        del moved
    assert [int(each) for each in sums] == [n << 20 for n in range(8)]


def test_the_nearest_neighbours_are_those_of_a_cpu() -> None:
    draw = torch.Generator().manual_seed(7)
    bank, queries = (nn.functional.normalize(torch.randn(n, 64, generator=draw), dim=-1) for n in (5000, 300))
    here, there = (Nearest.of(queries, 20, torch.device(kind)) for kind in ("cpu", "cuda"))
    for piece in torch.arange(5000).split(64):
        here.add(bank[piece], piece)
        there.add(bank[piece].cuda(), piece)
    assert there.keys.is_cuda
    assert torch.equal(there.keys.cpu(), here.keys)
