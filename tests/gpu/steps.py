"""Stages in this process: how fast a step is, how exact bf16 is, where the time goes and what DeepSpeed adds."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from setting import ROOT, Setting
from torch import Tensor, nn

from pipeline.costs.cost import model_cost
from pipeline.method.adapter import attach_adapter, blocks
from pipeline.method.route import RIDGE, Way, Work, cheapest
from pipeline.model.clip import Clip, load_clip
from pipeline.model.text import batch_tokenizer
from pipeline.model.towers import adapter_targets, apply_trainable, compile_layers
from pipeline.training.objective import Contrastive, Objective, PenaltySettings

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

WAYS: tuple[Way, ...] = ("two_path", "factors", "dense")
MFU_WANTED, OVER_PEFT = 0.35, {"lora": 1.4, "dora": 2.0}


class Variant(NamedTuple):
    """One way to train: whose blocks, of what rank, in what precision, compiled, with whole or short texts.

    graphs: compiled into CUDA graphs, which `selora train` does not do.
    """

    kind: Literal["lora", "dora", "full"] = "lora"
    peft: bool = False
    rank: int = 16
    compiled: bool = False
    precision: Literal["bf16", "fp32"] = "bf16"
    whole_texts: bool = False
    graphs: bool = False


class Steps:
    """Training steps as the product does them: uint8 images, autocast, FLYP loss, penalty, AdamW."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.device = setting, setting.device

    @cached_property
    def clip(self) -> Clip:
        return load_clip(self.setting.model, seed=0)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one pair, with a text of the whole context."""
        return sum(model_cost(self.clip).base.values())

    def model(self, variant: Variant) -> nn.Module:
        from subjects import PEFT_TARGETS, own, peft_of

        torch.manual_seed(0)  # of B, which starts away from zero here
        net = deepcopy(self.clip.model)
        if variant.kind == "full":
            apply_trainable(net, "all", "full")
        elif variant.peft:
            peft_of(net, PEFT_TARGETS, variant.rank, variant.kind)
            for name, parameter in net.named_parameters():
                if ".resblocks." not in name:
                    parameter.requires_grad_(True)
        else:
            own(net, adapter_targets(net), variant.rank, variant.kind)
            apply_trainable(net, "all", variant.kind)
        return net

    def objective(self, variant: Variant) -> Objective:
        from subjects import gates_of

        net = self.model(variant)
        if variant.compiled:
            compile_layers(net, mode="reduce-overhead" if variant.graphs else None)
        penalty = PenaltySettings("l1", "mean", 1.0, 0.1, 0)
        made = Objective(
            net,
            Contrastive(),
            gates_of(net),
            penalty,
            mean=self.clip.preprocess_cfg["mean"],
            std=self.clip.preprocess_cfg["std"],
            precision=variant.precision,
        )
        return made.to(self.device)

    def inputs(self, batch: int, *, whole_texts: bool = False) -> tuple[Tensor, Tensor]:
        """Images (batch, 3, H, W) uint8 and tokens (batch, L) on the device."""
        size = self.clip.preprocess_cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, device=self.device)
        tokenizer = self.clip.tokenizer if whole_texts else batch_tokenizer(self.clip.model, self.clip.tokenizer)
        return images, tokenizer([f"a photo of a class {i % 16}, number {i}." for i in range(batch)]).to(self.device)

    def step(self, objective: Objective, images: Tensor, tokens: Tensor) -> Callable[[], None]:
        trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=self.device.type == "cuda")

        def step() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            objective(images, tokens, 0)["total"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def race(self, title: str, variants: dict[str, Variant], batch: int, rounds: int = 3) -> dict[str, float]:
        """Variants take turns. Returns the seconds of each; those that fail or find no time are left out."""
        setting, findings = self.setting, self.setting.findings
        steps: dict[str, Callable[[], None]] = {}
        about: dict[str, tuple[float | None, float]] = {}
        for name, variant in variants.items():
            if not setting.has(45, f"{title}: {name}"):
                continue
            setting.clean()
            try:
                step = self.step(self.objective(variant), *self.inputs(batch, whole_texts=variant.whole_texts))
                begin = time.perf_counter()
                step()
                step()
                setting.wait()
            except ImportError as error:
                findings.skip(f"{title}: {name}", str(error))
                continue
            except RuntimeError as error:  # out of memory: the others go on
                findings.check(f"{title}: {name} runs", False, str(error).splitlines()[0][:120])
                continue
            steps[name], about[name] = step, (setting.peak_gb, time.perf_counter() - begin)
        found: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(rounds):
            for name in list(steps) if turn % 2 else reversed(list(steps)):
                found[name].append(min(setting.once(steps[name]) for _ in range(setting.size.repeats)))
        seconds = {name: sorted(values)[len(values) // 2] for name, values in found.items()}
        rows = [
            (name, 1e3 * each, batch / each, self.share(batch / each), *about[name]) for name, each in seconds.items()
        ]
        head = ("variant", "ms a step", "pairs/s", "MFU", "peak GB", "first two steps, s")
        findings.table(f"{title}, {batch} images", head, rows)
        steps.clear()
        setting.clean()
        return seconds

    def share(self, pairs_per_second: float) -> float | None:
        """MFU: four of the model's MACs a pair, which no exact method can leave out, over the card's peak."""
        return None if self.setting.peak is None else 4 * self.macs * pairs_per_second / self.setting.peak


def speed(setting: Setting) -> None:
    """Eager steps by batch and by kind, PEFT and full fine-tuning next to them."""
    steps, size = Steps(setting), setting.size
    for batch in size.batches:
        steps.race("Eager", {"selora LoRA r16": Variant()}, batch)
    variants = {f"{who} {kind.upper()} r16": Variant(kind, who == "PEFT") for kind in ("lora", "dora")
                for who in ("selora", "PEFT")}  # fmt: skip
    variants |= {
        "selora LORA r128": Variant(rank=128),
        "full": Variant("full"),
        "selora LORA r16, texts of 77 tokens": Variant(whole_texts=True),
        "selora LORA r16, fp32": Variant(precision="fp32"),
    }
    steps.race("Eager kinds", variants, size.middle)


def compiled(setting: Setting) -> None:
    """Compiled steps against PEFT as it comes, and whether a compiled step leaves its graph."""
    from torch._dynamo.utils import counters

    counters.clear()
    steps, size, findings = Steps(setting), setting.size, setting.findings
    variants = {
        "selora LoRA r16": Variant(compiled=True),
        "PEFT LoRA r16, eager": Variant(peft=True),
        "selora DoRA r16": Variant("dora", compiled=True),
        "PEFT DoRA r16, eager": Variant("dora", peft=True),
        "full": Variant("full", compiled=True),
        "selora LoRA r16, eager": Variant(),
        "selora LoRA r16, CUDA graphs": Variant(compiled=True, graphs=True),
    }
    if setting.tiny:
        variants = dict(list(variants.items())[:1])
    seconds = steps.race("Compiled", variants, size.middle)
    for batch in () if setting.tiny else (size.batches[-1], size.batches[0]):
        steps.race("Compiled", {"selora LoRA r16": Variant(compiled=True)}, batch)
    breaks = sum(counters["graph_break"].values())
    findings.check("no graph breaks", breaks == 0, f"{breaks}: {'; '.join(map(str, counters['graph_break']))[:200]}")
    if setting.peak is None:
        findings.skip("targets of speed", "they are those of a known card")
        return
    for kind, own, peer in (("lora", "selora LoRA r16", "PEFT LoRA r16, eager"),
                            ("dora", "selora DoRA r16", "PEFT DoRA r16, eager")):  # fmt: skip
        if own in seconds and peer in seconds:
            ratio = seconds[peer] / seconds[own]
            claim = f"{own}, compiled, is {OVER_PEFT[kind]} times as fast as eager PEFT"
            findings.check(claim, ratio >= OVER_PEFT[kind], f"{ratio:.2f}")
    if "selora LoRA r16" in seconds:
        mfu = steps.share(size.middle / seconds["selora LoRA r16"]) or 0.0
        findings.check(f"compiled LoRA reaches {MFU_WANTED:.0%} MFU", mfu >= MFU_WANTED, f"{mfu:.1%}")


@contextmanager
def forced(way: Way | None) -> Iterator[None]:
    """Inside, every block goes this way; None: as the product chooses."""
    from pipeline.method import linear

    chooses = linear.cheapest
    if way is not None:
        linear.cheapest = lambda work, device="cpu": way
    try:
        yield
    finally:
        linear.cheapest = chooses


def numerics(setting: Setting) -> None:
    """bf16 against fp32, by each way of a block: loss, and the gradients of A, B and the scores."""
    steps, rows = Steps(setting), []
    inputs = steps.inputs(4 if setting.tiny else 32)
    ends = ("lora_A", "lora_B", "gate.score")

    def gradients(variant: Variant, way: Way | None) -> tuple[float, dict[str, Tensor]]:
        objective = steps.objective(variant)
        with forced(way):
            losses = objective(*inputs, 0)
            losses["total"].backward()
        named = [(n, p.grad.double().cpu()) for n, p in objective.named_parameters() if p.grad is not None]
        joined = {end: torch.cat([grad.flatten() for name, grad in named if name.endswith(end)]) for end in ends}
        return float(losses["task"]), joined

    for kind in ("lora", "dora"):
        loss, exact = gradients(Variant(kind, precision="fp32"), None)
        for way in WAYS:
            own, found = gradients(Variant(kind), way)
            off = [float((found[end] - exact[end]).norm() / exact[end].norm()) for end in ends]
            rows.append((kind, way, abs(own - loss) / abs(loss), *off))
            setting.findings.check(
                f"{kind} by {way}: bf16 loss within 2 % of fp32", rows[-1][2] < 0.02, f"{rows[-1][2]:.1e}"
            )
            setting.clean()
    setting.findings.table("bf16 against fp32, relative", ("kind", "way", "loss", "dA", "dB", "dscore"), rows)


def ways(setting: Setting) -> None:
    """One block forward and backward by each way, and which RIDGE chooses best among them."""
    rows: list[tuple[Any, ...]] = []
    works: list[tuple[Work, dict[Way, float]]] = []
    tokens = 640 if setting.tiny else 256 * 197
    for inputs, outputs in setting.size.shapes:
        x = torch.randn(tokens, inputs, device=setting.device, dtype=torch.bfloat16, requires_grad=True)
        for kind in ("lora", "dora"):
            for rank in setting.size.ranks:
                if not setting.has(25, f"ways of {kind} r{rank} {inputs}->{outputs}"):
                    continue
                spent: dict[Way, float] = {
                    way: 1e3 * setting.timed(_block(x, outputs, kind, rank, way)) for way in WAYS
                }
                work = Work(tokens, inputs, outputs, rank, kind == "dora", True, None)
                chosen, best = cheapest(work, setting.device.type), min(spent, key=spent.__getitem__)
                works.append((work, spent))
                rows.append(
                    (kind, f"{inputs} to {outputs}", rank, *spent.values(), best, chosen, spent[chosen] / spent[best])
                )
    head = ("kind", "shape", "rank", *WAYS, "fastest", "chosen", "chosen / fastest")
    setting.findings.table("A block by each way, ms", head, rows)
    if not works:
        return
    kind, now = setting.device.type, RIDGE[setting.device.type]
    lost = {ridge: _lost(works, kind, ridge) for ridge in sorted({now, *(2**n * 25 for n in range(7))})}
    setting.findings.table("Time by RIDGE, against the fastest ways", ("RIDGE", "time / fastest"), list(lost.items()),
                           f'RIDGE["{kind}"] is {now} in pipeline/method/route.py.')  # fmt: skip
    if kind == "cuda":
        setting.findings.check(
            "RIDGE loses under 5 %", lost[now] < 1.05, f"{lost[now]:.3f}, best {min(lost.values()):.3f}"
        )


def _block(x: Tensor, outputs: int, kind: str, rank: int, way: Way) -> Callable[[], None]:
    net = nn.Sequential(nn.Linear(x.shape[-1], outputs)).to(x.device)
    attach_adapter({"b": (net, "0")}, rank=rank, kind=kind)  # pyright: ignore[reportArgumentType]
    assert len(blocks(net)) == 1

    def step() -> None:
        with forced(way), torch.autocast(x.device.type, torch.bfloat16):
            y = net(x)
        y.backward(torch.ones_like(y))
        x.grad = None

    return step


def _lost(works: list[tuple[Work, dict[Way, float]]], device: str, ridge: int) -> float:
    """Time of all blocks as this RIDGE would have them go, over the time of the fastest ways."""
    before = RIDGE[device]
    RIDGE[device] = ridge
    try:
        taken = sum(spent[cheapest(work, device)] for work, spent in works)
    finally:
        RIDGE[device] = before
    return taken / sum(min(spent.values()) for _, spent in works)


def engine(setting: Setting) -> None:
    """A DeepSpeed step against a plain one, and every place where its host waits for the card."""
    from training_runs import config

    from pipeline.config import load_config
    from pipeline.model.towers import inside_layers
    from pipeline.training.cluster.distributed import read_world
    from pipeline.training.engine import build_engine, set_learning_rates, start_process_group
    from pipeline.training.model import trainable
    from pipeline.training.optim import Rates, parameter_groups

    steps, rows, batch = Steps(setting), [], setting.size.middle
    world = read_world({})
    start_process_group(world)
    compiled = not setting.tiny  # as a run on a card is
    for stage in (0, 1, 2):
        if not setting.has(40, f"engine, ZeRO {stage}"):
            continue
        changes = ["model.precision=bf16", f"train.zero_stage={stage}", f"train.global_batch_size={batch}"]
        objective, inputs = steps.objective(Variant(compiled=compiled)), steps.inputs(batch)
        groups = parameter_groups(trainable(objective.model), inside_layers, Rates(1e-6, 1e-6, 1e-6), 0.1)
        plain = setting.timed(steps.step(objective, *inputs))
        wrapped = build_engine(objective, groups, load_config(config(setting), changes), world)
        set_learning_rates(wrapped, 0.1)

        def step(wrapped: Any = wrapped, inputs: tuple[Tensor, Tensor] = inputs) -> None:
            wrapped.backward(wrapped(*inputs, 0)["total"])
            wrapped.step()

        step()
        own, waits = setting.timed(step), _host_waits(setting, step)
        rows.append((f"ZeRO {stage}", 1e3 * plain, 1e3 * own, own / plain, setting.peak_gb, sum(waits.values())))
        if setting.device.type == "cuda":
            setting.findings.check(
                f"a step under ZeRO {stage} never waits", not waits, ", ".join(map(str, waits.items())) or "0"
            )
        del wrapped, objective, step
        setting.clean()
    head = ("stage", "plain, ms", "DeepSpeed, ms", "ratio", "peak GB", "host waits")
    setting.findings.table(f"A step inside DeepSpeed, {batch} images", head, rows)


def _host_waits(setting: Setting, step: Callable[[], None]) -> Counter[str]:
    """File and line of every place where the host waits for the card in a step; none are seen on a CPU."""
    if setting.device.type != "cuda":
        return Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(each.filename).name}:{each.lineno}" for each in caught)


def profile(setting: Setting) -> None:
    """The kernels that take most of a step, eager and compiled."""
    steps, card = Steps(setting), setting.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    for name in ("eager",) if setting.tiny else ("eager", "compiled"):
        if not setting.has(30, f"profile, {name}"):
            continue
        setting.clean()
        step = steps.step(steps.objective(Variant(compiled=name == "compiled")), *steps.inputs(setting.size.middle))
        step()
        step()
        with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if card else [])]) as found:
            step()
            setting.wait()
        table = found.key_averages()
        by = "self_device_time_total" if card else "self_cpu_time_total"
        (setting.findings.folder / f"profile-{name}.txt").write_text(table.table(sort_by=by, row_limit=60))
        ranked = sorted(table, key=lambda each: getattr(each, by), reverse=True)
        total = sum(getattr(each, by) for each in ranked) or 1
        rows = [(each.key[:80], each.count, getattr(each, by) / 1e3, getattr(each, by) / total) for each in ranked[:12]]
        setting.findings.table(f"What takes the time of a step, {name}", ("kernel", "calls", "ms", "share"), rows)
