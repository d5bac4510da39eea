"""A training step of ViT-B/16 in bf16 on a card, traced on shapes: what it keeps, how long it computes, its MFU.

    python tests/benchmarks/roofline.py [--batch 512]

No card is needed and nothing is measured: the step runs on fake tensors, with the dtypes of autocast and every block on
the way that it goes on a card. An operation takes as long as its FLOPs or as the bytes that it reads and writes,
whichever is longer (a roofline). Compiled, element-wise work is computed in the kernel that needs it: only what a
matrix product, attention or a layer norm reads is written to memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple
from unittest import mock

import open_clip.transformer
import torch
from kernels import LAYERS, Kernels, subject
from subjects import gates_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from pipeline.costs.scale import PEAK, SHAPES
from pipeline.method import route
from pipeline.model.activation import QuickGELU
from pipeline.training import objective as objectives
from pipeline.training.objective import Contrastive, Objective, PenaltySettings

# Of an H100: what large bf16 products and streaming reach of the data sheet, and a host's time for each launch.
FLOPS, BANDWIDTH, LAUNCH_S = 650e12, 2.8e12, 8e-6
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
NORMS = ("native_layer_norm", "native_layer_norm_backward")


class Step(NamedTuple):
    """What is traced. whole_texts: texts of 77 tokens; stock_gelu: open_clip's own QuickGELU.

    Layers are alike, so the figures of twelve follow from traces of one and of two.
    """

    kind: Literal["lora", "dora", "full"] = "lora"
    who: Literal["selora", "PEFT"] = "selora"
    batch: int = 512
    whole_texts: bool = False
    stock_gelu: bool = False
    layers: int = 1


@dataclass
class Operation:
    """A kernel: its FLOPs, and the tensors that it reads and writes, each as (storage, version) -> bytes."""

    name: str
    flops: float
    reads: dict[tuple[int, int], int]
    writes: dict[tuple[int, int], int]


@dataclass
class Trace(Kernels):
    """Records the kernels that run inside, and what they read and write."""

    operations: list[Operation] = field(default_factory=list)
    versions: dict[int, int] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)  # or an address could be another storage's later

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.found.total()
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        reads = {self._place(each): _size(each) for each in inputs}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        outputs = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        if self.found.total() > before and outputs:  # fake tensors ask for their device by an operation
            for each in outputs:
                place = each.untyped_storage()._cdata
                self.versions[place] = self.versions.get(place, 0) + 1
            name = func._schema.name.partition("::")[2]
            writes = {self._place(each): _size(each) for each in outputs}
            self.operations.append(Operation(name, _flops(name, args, outputs), reads, writes))
            self.alive += [*inputs, *outputs]
        return out

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        place = tensor.untyped_storage()._cdata
        return place, self.versions.get(place, 0)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flops(name: str, args: Any, outputs: list[Tensor]) -> float:
    """Of products and attention: what the card's matrix units compute."""
    if name in ATTENTION:
        backward = name.endswith("backward")
        query, key = args[backward : backward + 2]
        causal = args[9 if backward else 4] if len(args) > (9 if backward else 4) else False
        return 4 * query.numel() * key.shape[-2] * (2.5 if backward else 1) * (0.5 if causal else 1)
    if name == "convolution":  # the patches: each output is a product with one filter
        return 2 * outputs[0].numel() * args[1][0].numel()
    if name == "convolution_backward":  # of the filters alone, which read no gradient of pixels
        return 2 * args[0].numel() * args[2][0].numel()
    if name in PRODUCTS:
        first = args[1 if name in ("addmm", "baddbmm") else 0]
        return 2 * outputs[0].numel() * first.shape[-1]
    return 0.0


@contextmanager
def on_a_card(step: Step) -> Iterator[tuple[Objective, Tensor, Tensor]]:
    """Inside, the objective of a step and its inputs, as fake tensors of the CPU.

    Blocks choose their way as on a card, and no gate is read on the host.
    """
    net = subject(step.kind, step.who, step.layers)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(route.RIDGE, {"cpu": route.RIDGE["cuda"]}))
        stack.enter_context(mock.patch.object(objectives, "read_gates"))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        _fill(net)
        if step.stock_gelu:
            _put_back_stock_gelu(net)
        penalty, half = PenaltySettings("l1", "mean", 1.0, 0.1, 0), (0.5,) * 3
        images = torch.empty(step.batch, 3, 224, 224, dtype=torch.uint8)
        tokens = torch.empty(step.batch, 77 if step.whole_texts else 16, dtype=torch.long)
        yield (
            Objective(net, Contrastive(), gates_of(net), penalty, mean=half, std=half, precision="bf16"),
            images,
            tokens,
        )


def _fill(net: nn.Module) -> None:
    """Tensors of the device where there were shapes."""
    for module in net.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(torch.empty(value.shape), requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def _put_back_stock_gelu(net: nn.Module) -> None:
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuickGELU):
                setattr(parent, name, open_clip.transformer.QuickGELU())


def of_all_layers(figure: Callable[[Step], float], step: Step) -> float:
    """A figure of ViT-B/16, from that of its first layers."""
    one, two = (figure(step._replace(layers=layers)) for layers in (1, 2))
    return one + (LAYERS - 1) * (two - one)


@cache
def kept_bytes(step: Step) -> int:
    """Bytes that the forward keeps for the backward, each storage once, without the parameters."""
    found: dict[int, Tensor] = {}
    with on_a_card(step) as (objective, *inputs):
        own = {parameter.untyped_storage()._cdata for parameter in objective.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each: found.setdefault(each.untyped_storage()._cdata, each) if each.numel() else each, lambda t: t
        ):
            objective(*inputs, 0)
    return sum(each.untyped_storage().nbytes() for place, each in found.items() if place not in own)


@cache
def traced(step: Step) -> tuple[Operation, ...]:
    """The kernels of forward, loss and backward."""
    with on_a_card(step) as (objective, *inputs), Trace() as trace:
        objective(*inputs, 0)["total"].backward()
    return tuple(trace.operations)


def seconds(step: Step, *, compiled: bool = False) -> float:
    """Computed seconds of a step on one card; an eager one takes at least as long as its launches."""
    if compiled:
        return of_all_layers(lambda each: _compiled_seconds(traced(each)), step)
    launches = LAUNCH_S * of_all_layers(lambda each: len(traced(each)), step)
    return max(of_all_layers(lambda each: _eager_seconds(traced(each)), step), launches)


def _eager_seconds(operations: tuple[Operation, ...]) -> float:
    return sum(_roofline(each.flops, sum(each.reads.values()) + sum(each.writes.values())) for each in operations)


def _roofline(flops: float, size: float) -> float:
    return max(flops / FLOPS, size / BANDWIDTH)


def _compiled_seconds(operations: tuple[Operation, ...]) -> float:
    """Element-wise operations join the kernel that reads them."""
    whole = (*PRODUCTS, *ATTENTION, *NORMS)
    written = {place for each in operations if each.name in whole for place in (*each.reads, *each.writes)}
    made_of: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
    total = 0.0
    for each in operations:
        sources: dict[tuple[int, int], int] = {}
        for place, size in each.reads.items():
            sources |= {place: size} if place in written or place not in made_of else made_of[place]
        stored = {place: size for place, size in each.writes.items() if place in written}
        for place, size in each.writes.items():
            # what is small is the end of a reduction, and is kept
            made_of[place] = {place: size} if place in stored or 64 * size < sum(sources.values()) else sources
        if each.name in whole:
            total += _roofline(each.flops, sum(each.reads.values()) + sum(each.writes.values()))
        elif stored or 64 * sum(each.writes.values()) < sum(sources.values()):
            total += _roofline(0.0, sum(sources.values()) + sum(stored.values()))
    return total


def mfu(step: Step, *, compiled: bool = False) -> float:
    """Four times the multiply-accumulates of pairs with texts of 77 tokens over what the card could do in the time."""
    return 4 * SHAPES["ViT-B-16"].macs * step.batch / seconds(step, compiled=compiled) / PEAK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512, help="images a step")
    print("\n".join(table(parser.parse_args().batch)))


def table(batch: int) -> Iterator[str]:
    """The table in Markdown."""
    yield from (
        "| step | keeps, GB | eager, ms | MFU, % | compiled, ms | MFU, % |",
        "| --- | --: | --: | --: | --: | --: |",
    )
    steps = {
        "LoRA r16, stock QuickGELU, texts of 77": Step(batch=batch, whole_texts=True, stock_gelu=True),
        "LoRA r16, texts of 77": Step(batch=batch, whole_texts=True),
        "LoRA r16": Step(batch=batch),
        "DoRA r16": Step("dora", batch=batch),
        "full": Step("full", batch=batch),
    }
    for name, step in steps.items():
        cells = [f"{of_all_layers(kept_bytes, step) / 1e9:.1f}"]
        for compiled in (False, True):
            cells += [f"{1e3 * seconds(step, compiled=compiled):.0f}", f"{100 * mfu(step, compiled=compiled):.0f}"]
        yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
