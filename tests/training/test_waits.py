"""A training step never waits for the device: it runs on shapes, which have no values to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.method.adapter import attach_adapter, blocks
from pipeline.method.gate import read_gates
from pipeline.model.activation import QuickGELU
from pipeline.model.clip import load_clip
from pipeline.model.towers import adapter_targets, apply_trainable
from pipeline.training.cluster.distributed import read_world
from pipeline.training.device import on_device
from pipeline.training.loop import Inputs, StopRequest, Training, train_steps
from pipeline.training.monitor import Monitor
from pipeline.training.objective import Contrastive, Objective, PenaltySettings

BATCH, STEPS = 4, 2
# What makes the host wait: reading a value, counting what is not zero, and every copy to the CPU.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "is_nonzero")


class Waits(TorchDispatchMode):
    """Counts the operations at which a host waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        devices = {arg.device.type for arg in args if isinstance(arg, Tensor)}
        to_host = "_to_copy" in name and str((kwargs or {}).get("device", "")) == "cpu"
        # A value that was always on the CPU, such as AdamW's count of steps, is there to be read.
        if devices - {"cpu"} and (to_host or any(wait in name for wait in WAITS)):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Batch:
    step: int
    images: Tensor
    tokens: Tensor
    captions: list[str]
    keys: list[str]
    bad: list[str]
    retries: int = 0
    cut: tuple[str, ...] = ()


class Engine:
    """The objective and AdamW, called as DeepSpeed's engine is."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.device = objective, torch.device("meta")
        trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self.optimizer: Any = torch.optim.AdamW(trained, lr=0.1, capturable=False, foreach=False)
        for group in self.optimizer.param_groups:
            group["peak_lr"] = 0.1

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        return self.objective(*inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def objective(folder: Path, kind: str, micro: int | None, checkpointing: bool) -> Objective:
    clip = load_clip(f"local-dir:{folder}")
    attach_adapter(adapter_targets(clip.model), rank=2, kind=kind)  # pyright: ignore[reportArgumentType]
    apply_trainable(clip.model, "all", kind)
    if checkpointing:
        clip.model.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
    gates = [block.gate for block in blocks(clip.model).values() if block.gate is not None]
    settings = PenaltySettings("l1", "mean", 1.0, 0.1, 0)
    made = Objective(
        clip.model, Contrastive(), gates, settings, mean=(0.5,) * 3, std=(0.5,) * 3, precision="fp32", micro_batch=micro
    )
    return made.to("meta")


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.ProcessGroup]:
    if dist.is_initialized():  # by a test that trained in this process
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    yield group
    dist.destroy_process_group()


def batch_of(step: int) -> Batch:
    images = torch.zeros(BATCH, 3, 32, 32, dtype=torch.uint8)
    return Batch(step, images, torch.ones(BATCH, 8, dtype=torch.long), ["a"] * BATCH, ["s/1"] * BATCH, [])


def train(made: Objective, control: dist.ProcessGroup, waits: Waits) -> int:
    """`train_steps` over shapes, with the monitor between two of its reports."""
    world = read_world({})
    monitor = Monitor(
        world=world,
        control=control,
        sink=None,  # pyright: ignore[reportArgumentType]
        gates=dict,
        drift=dict,
        total_steps=100,
        global_batch_size=BATCH,
        peak_lr=0.1,
        log_every=50,
        gates_every=50,
        bad_limit=0,
        negatives=True,
    )
    training = Training(
        engine=Engine(made),
        batches=[batch_of(step) for step in range(STEPS)],
        inputs=lambda batch: Inputs(batch.images, batch.tokens, None, None),
        schedule=lambda _: 1.0,
        after_step=[monitor.after_step],
        save=lambda done, last: None,
        close=lambda: None,
        checkpoint_every=10**6,
        total_steps=100,
        seed=0,
        control=control,
    )
    with waits:
        return train_steps(training, StopRequest())


@pytest.mark.parametrize(
    ("kind", "micro", "checkpointing"),
    [
        ("dora", None, False),
        ("lora", 2, False),
        ("lora", None, True),
        pytest.param("lora", None, False, marks=pytest.mark.slow),
        pytest.param("dora", 2, False, marks=pytest.mark.slow),
        pytest.param("dora", None, True, marks=pytest.mark.slow),
    ],
)
def test_no_step_waits(
    kind: str, micro: int | None, checkpointing: bool, tiny_clip: Path, control: dist.ProcessGroup
) -> None:
    waits = Waits()
    assert train(objective(tiny_clip, kind, micro, checkpointing), control, waits) == STEPS
    assert not waits.found


@pytest.mark.parametrize("how", ["item", "tolist", "cpu", "nonzero", "gates"])
def test_one_that_waits_is_found(
    how: str, tiny_clip: Path, control: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = objective(tiny_clip, "lora", None, False)
    forward = made.forward

    def waiting(*inputs: Any) -> dict[str, Tensor]:
        losses = forward(*inputs)
        if how == "gates":
            read_gates(made._gates)
        elif how == "nonzero":
            losses["total"].reshape(1).nonzero()
        else:
            getattr(losses["total"].reshape(1), how)()
        return losses

    monkeypatch.setattr(made, "forward", waiting)
    with pytest.raises((RuntimeError, NotImplementedError)):
        train(made, control, Waits())


def test_batches_come_in_order_with_their_inputs() -> None:
    def inputs(n: int) -> Inputs:
        return Inputs(torch.full((2,), n), torch.tensor(n), None, None)

    found = list(on_device(iter([1, 2, 3]), inputs, torch.device("cpu")))
    assert [(n, [each.tolist() for each in moved.tensors()]) for n, moved in found] == [
        (n, [[n, n], n]) for n in (1, 2, 3)
    ]


def test_quick_gelu_runs_on_shapes() -> None:
    x = torch.empty(2, 3, device="meta", requires_grad=True)
    nn.Sequential(QuickGELU())(x).sum().backward()
    assert x.grad is not None
