"""Rows 12 and 13: training steps and inference of ViT-B/16 in bf16 on a GPU, timed by CUDA events.

On the CPU the same code runs on a small model, so that it is known to run before a GPU is rented.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from measure import Line, Times, alternate, spread
from subjects import PEFT_TARGETS, SmallClip, gates_of, own, peft_of
from torch import nn

from pipeline.costs.cost import model_cost
from pipeline.data.images import size_pair
from pipeline.method.adapter import merge_adapter
from pipeline.method.gate import read_gates
from pipeline.model.clip import Clip, load_clip
from pipeline.model.towers import adapter_targets

Step = Callable[[], object]
# Dense bf16 FLOPs a second by the makers' data sheets.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


@dataclass(frozen=True)
class Size:
    """How large rows 12 and 13 are; the targets hold for the default."""

    model: str = "ViT-B-16"
    batch: int = 256
    ranks: tuple[int, ...] = (16, 256)
    inference_batch: int = 512


class OnDevice(SmallClip):
    """Training steps of a CLIP of any size on a device: forward under autocast to bf16, backward, no optimizer."""

    def __init__(self, clip: Clip, batch: int, device: torch.device) -> None:
        self.clip, self.device = clip, device
        clip.model.to(device)
        module: Any = clip.model
        size, context = clip.preprocess_cfg["size"], module.context_length
        self.images = torch.randn(batch, 3, *size_pair(size), device=device)
        self.tokens = torch.randint(1, 49000, (batch, context), device=device)
        self.tokens[:, context // 4] = 49407

    def step(self, model: nn.Module, *, compiled: bool = False) -> Step:
        gates = gates_of(model)
        run: Any = torch.compile(model) if compiled else model

        def step() -> None:
            model.zero_grad()
            read_gates(gates)
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.loss(run)
            loss.backward()

        return step


def train_steps(rounds: int, device: str = "cuda", size: Size | None = None) -> list[Line]:
    size, where = size or Size(), torch.device(device)
    lines = []
    subject = OnDevice(load_clip(size.model, seed=0), size.batch, where)
    macs = sum(model_cost(subject.clip).base.values()) * size.batch
    full = subject.step(subject.full(), compiled=True)
    for rank in size.ranks:
        for kind in ("lora", "dora"):
            steps = {
                "full": full,
                "own eager": subject.step(subject.own(rank, kind)),
                "own": subject.step(subject.own(rank, kind), compiled=True),
                "peft eager": subject.step(subject.peft(rank, kind)),
                "peft": subject.step(subject.peft(rank, kind), compiled=True),
            }
            times = _alternate(steps, rounds, where)
            name, target = f"train-{kind}-r{rank}", 1.4 if kind == "lora" else 2.0
            note = ", ".join(f"{each} {1e3 * times.median(each):.1f} ms" for each in steps)
            lines += [
                Line(12, name, "PEFT eager / selora", times.ratio("peft eager", "own"), target, True, "", note),
                Line(12, name, "PEFT compiled / selora", times.ratio("peft", "own"), None, True, ""),
                Line(12, name, "PEFT eager / selora eager", times.ratio("peft eager", "own eager"), None, True, ""),
                Line(12, name, "selora / full compiled", times.ratio("own", "full"), 1.05, False, ".67 by FLOPs"),
                *_utilisation(12, name, 4 * macs, times, where),
            ]
    return lines


def inference(rounds: int, device: str = "cuda", size: Size | None = None) -> list[Line]:
    size, where = size or Size(), torch.device(device)
    clip = load_clip(size.model, seed=0)
    plain: Any = clip.model.eval().requires_grad_(False).to(where, torch.bfloat16)
    merged = deepcopy(plain)
    merge_adapter(own(merged, adapter_targets(merged), max(size.ranks), "dora"))
    models = {
        "plain": plain,
        "merged": merged,
        "peft lora": peft_of(deepcopy(plain), PEFT_TARGETS, max(size.ranks), "lora"),
        "peft dora": peft_of(deepcopy(plain), PEFT_TARGETS, max(size.ranks), "dora"),
    }
    macs, lines = model_cost(clip).base["image"], []
    for batch in (1, size.inference_batch):
        images = torch.randn(batch, 3, *size_pair(clip.preprocess_cfg["size"]), device=where, dtype=torch.bfloat16)
        steps = {name: _encode(model, images) for name, model in models.items()}
        # A batch of 1 is a matter of launches, which a server takes out with a graph; PEFT is shown as it comes.
        steps |= {name: _graphed(steps[name], where) for name in ("plain", "merged") if batch == 1}
        times, name = _alternate(steps, rounds, where), f"inference-b{batch}"
        lines += [
            Line(13, name, "merged / plain CLIP", times.ratio("merged", "plain"), 1.02, False, "1.00"),
            *(
                Line(13, name, f"PEFT {kind} / merged", times.ratio(f"peft {kind}", "merged"), None, True, flops)
                for kind, flops in (("lora", "1.48 by FLOPs"), ("dora", "4.88 by FLOPs"))
            ),
        ]
        if batch > 1:
            rate = spread([batch / seconds for seconds in times.seconds["merged"]])
            lines.append(Line(13, name, "images a second, merged", rate, 10_000, True, "22,500 on an H200"))
            lines += _utilisation(13, name, macs * batch, times, where, "merged")
    return lines


def _utilisation(row: int, name: str, macs: int, times: Times, device: torch.device, which: str = "own") -> list[Line]:
    """The share of the card's peak; `macs` counts what no exact method can leave out."""
    peak = next((peak for card, peak in PEAK.items() if card in _card(device)), None)
    if peak is None:
        return []
    share = spread([2 * macs / seconds / peak for seconds in times.seconds[which]])
    target = 0.4 if row == 12 else None
    return [Line(row, name, f"MFU of {which}", share, target, True, "1.0", f"peak {peak / 1e12:.0f} TFLOPS")]


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _alternate(steps: dict[str, Step], rounds: int, device: torch.device) -> Times:
    for step in steps.values():
        for _ in range(2):  # compile, and let cuBLAS choose
            step()
    return alternate(steps, rounds, partial(_seconds, device))


def _seconds(device: torch.device, step: Step, repeats: int = 5) -> float:
    if device.type != "cuda":
        start = time.process_time()
        step()
        return time.process_time() - start
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return median(found)


def _encode(model: Any, images: torch.Tensor) -> Step:
    @torch.no_grad()
    def forward() -> object:
        return model.encode_image(images)

    return forward


def _graphed(step: Step, device: torch.device) -> Step:
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


ROWS: dict[int, Callable[[int], list[Line]]] = {12: train_steps, 13: inference}


def why_not() -> str | None:
    """Why the rows cannot run here; None if they can."""
    return None if torch.cuda.is_available() else "no CUDA device"
