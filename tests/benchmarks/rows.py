"""The rows of the benchmark: each function measures one and returns its lines."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import open_clip
import torch
from measure import Line, Ratio, alternate, flops, saved_bytes
from subjects import PEFT_TARGETS, SMALL_CLIP, Linear, SmallClip, features, gates_of, own, peft_of, vit_b_16
from torch import nn

from pipeline.data.reference.samples import Reference
from pipeline.method.adapter import merge_adapter
from pipeline.method.contrastive import flyp_loss
from pipeline.method.gate import read_gates
from pipeline.model.towers import adapter_targets
from pipeline.training.objective import Contrastive, KeepSettings, Objective, PenaltySettings

RANKS = (4, 16, 32, 64, 128, 256)


def lora_linear(rounds: int) -> list[Line]:
    subject = Linear(384, 384)
    times = alternate({"own": subject.own(256, "lora"), "peft": subject.peft(256, "lora")}, rounds)
    return [Line(1, "lora-step-r256", "PEFT LoRA / selora", times.ratio("peft", "own"), 1.8, True, "1.85 by FLOPs")]


def dora_linear(rounds: int) -> list[Line]:
    subject = Linear(384, 384)
    times = alternate({"own": subject.own(256, "dora"), "peft": subject.peft(256, "dora")}, rounds)
    return [Line(2, "dora-step-r256", "PEFT DoRA / selora", times.ratio("peft", "own"), 2.1, True, "2.3 by FLOPs")]


def low_rank_linear(rounds: int) -> list[Line]:
    subject = Linear(384, 1536)
    times = alternate({"own": subject.own(16, "lora"), "full": subject.full()}, rounds)
    return [Line(3, "lora-step-r16", "selora / full", times.ratio("own", "full"), 0.76, False, ".70; .667 at any rank")]


def model_steps(rounds: int) -> list[Line]:
    subject = SmallClip()
    lines = []
    for rank in RANKS:
        models = {
            "full": subject.full(),
            "own lora": subject.own(rank, "lora"),
            "own dora": subject.own(rank, "dora"),
            "peft lora": subject.peft(rank, "lora"),
            "peft dora": subject.peft(rank, "dora"),
        }
        steps = {name: subject.step(model) for name, model in models.items()}
        times, counted = alternate(steps, rounds), {name: flops(step) for name, step in steps.items()}
        for kind in ("lora", "dora"):
            peer = min(("full", f"peft {kind}"), key=times.median)
            what = f"selora {kind} / better of PEFT and full ({peer})"
            limit = f"{counted[f'own {kind}'] / counted[peer]:.2f} by FLOPs"
            lines.append(Line(4, f"model-{kind}-r{rank}", what, times.ratio(f"own {kind}", peer), 1.03, False, limit))
        if rank == max(RANKS):
            for kind, target in (("lora", 1.4), ("dora", 1.5)):
                ratio = times.ratio(f"peft {kind}", f"own {kind}")
                lines.append(
                    Line(4, f"model-{kind}-r{rank}", f"PEFT {kind} / selora", ratio, target, True, "best per layer")
                )
    return lines


def dora_activations(_: int) -> list[Line]:
    subject = SmallClip(batch=8)
    kept = {}
    for name, model in (
        ("own", subject.own(256, "dora")),
        ("peft", subject.peft(256, "dora")),
        ("full", subject.full()),
    ):
        read_gates(gates_of(model))
        kept[name] = saved_bytes(lambda model=model: subject.loss(model), list(model.parameters()))
    exact = kept["own"] / kept["peft"]
    note = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in kept.items())
    limit = f"{kept['full'] / kept['peft']:.2f}: what full fine-tuning keeps"
    return [Line(5, "dora-activations", "selora / PEFT DoRA", Ratio(exact, exact, exact), 0.55, False, limit, note)]


def closed_gates(rounds: int) -> list[Line]:
    subject = SmallClip()
    models = {
        "few": subject.own(256, "lora", open_share=0.05),
        "all": subject.own(256, "lora"),
        "peft": subject.peft(256, "lora"),
    }
    times = alternate({name: subject.step(model) for name, model in models.items()}, rounds)
    return [
        Line(6, "closed-gates", "all open / 5 % open", times.ratio("all", "few"), 1.35, True, "1.40 at T = 25,216"),
        Line(6, "closed-gates", "PEFT all open / 5 % open", times.ratio("peft", "few"), 1.9, True, "2.2"),
    ]


def gate_gradient(rounds: int) -> list[Line]:
    subject = Linear(384, 1536)
    b, grad_b, delta = torch.randn(1536, 256), torch.randn(1536, 256), torch.randn(1536, 384)
    rows = torch.randn(3152, 384), torch.randn(3152, 1536)
    repeats = 20

    def factors() -> None:
        for _ in range(repeats):
            (b * grad_b).sum(1, keepdim=True).sum()

    def dense() -> None:
        (rows[1].T @ rows[0]).mul_(delta).sum()

    times = alternate({"factors": factors, "dense": dense, "step": subject.own(256, "lora")}, rounds)
    share = times.ratio("factors", "step")
    exact = Ratio(*(value / repeats for value in (share.value, share.low, share.high)))
    return [
        Line(7, "gate-gradient", "score's gradient / step", exact, 0.01, False, "mr / 6Tmn"),
        Line(7, "gate-gradient", "dense <D, BA> / step", times.ratio("dense", "step"), None, False, "1/3 of full"),
    ]


def inference(rounds: int, batches: tuple[int, ...] = (1,)) -> list[Line]:
    plain = vit_b_16().eval().requires_grad_(False)
    merged = deepcopy(plain)
    merge_adapter(own(merged, adapter_targets(merged), 256, "dora"))
    models: dict[str, nn.Module] = {
        "plain": plain,
        "merged": merged,
        "peft lora": peft_of(deepcopy(plain), PEFT_TARGETS, 256, "lora"),
        "peft dora": peft_of(deepcopy(plain), PEFT_TARGETS, 256, "dora"),
    }
    lines = []
    for batch in batches:
        images = torch.randn(batch, 3, 224, 224)
        times = alternate({name: _encode(model, images) for name, model in models.items()}, rounds)
        name = f"inference-b{batch}"
        lines.append(Line(8, name, "merged / plain CLIP", times.ratio("merged", "plain"), 1.01, False, "1.00"))
        for kind, target, limit in (("lora", 1.45, "1.48"), ("dora", 4.5, "4.88")):
            ratio, wanted = times.ratio(f"peft {kind}", "merged"), target if batch == 1 else None
            lines.append(Line(8, name, f"PEFT {kind} unmerged / merged", ratio, wanted, True, f"{limit} by FLOPs"))
    return lines


def _encode(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def forward() -> object:
        return model.encode_image(images)  # pyright: ignore[reportCallIssue]

    return forward


def contrastive(rounds: int) -> list[Line]:
    return [line for rows in (512, 2048) for line in _contrastive(rows, rounds)]


def _contrastive(rows: int, rounds: int) -> list[Line]:
    image, text, scale = features(rows)
    losses: dict[str, Callable[..., torch.Tensor]] = {
        "own": flyp_loss,
        "chunked": lambda *inputs: flyp_loss(*inputs, chunk_rows=rows // 16),
        "open_clip": open_clip.ClipLoss(),
    }
    steps = {name: (lambda loss=loss: loss(image, text, scale).backward()) for name, loss in losses.items()}
    times = alternate(steps, rounds)
    inputs = [image, text, scale]
    kept = {name: saved_bytes(lambda loss=loss: loss(*inputs), inputs) for name, loss in losses.items()}
    # beside what is kept, a backward works on two more matrices of logits: two chunks of them, or two whole ones
    working = 2 * 4 * rows * rows
    memory = (kept["chunked"] + working // 16) / (kept["open_clip"] + working)
    note = "kept: " + ", ".join(f"{name} {size / 2**20:.2f} MiB" for name, size in kept.items())
    name = f"loss-{rows}"
    return [
        Line(11, name, "selora / ClipLoss", times.ratio("own", "open_clip"), 0.75, False, ".5 by FLOPs"),
        Line(11, name, "chunked / ClipLoss", times.ratio("chunked", "open_clip"), None, False, ".67 by FLOPs"),
        Line(11, name, "memory: chunked / ClipLoss", Ratio(memory, memory, memory), 0.2, False, "O(chunk N)", note),
    ]


def keeping(rounds: int) -> list[Line]:
    """A step of 32 images with an eighth and with half as many reference images and texts, against none."""
    subject, batch = SmallClip(batch=48), 32
    images = torch.randint(256, (48, 3, 224, 224), dtype=torch.uint8)
    untouched = torch.randn(48, SMALL_CLIP["embed_dim"])
    model = subject.own(16, "lora")
    objective = Objective(
        model,
        Contrastive(),
        gates_of(model),
        PenaltySettings("l1", "mean", 0.0, 0.0, 0),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        precision="fp32",
        keep=KeepSettings(3.0, 0.0),
    )

    def loss(own: int, reference: int) -> torch.Tensor:
        rest = slice(own, own + reference)
        held = Reference(images[rest], untouched[rest], subject.tokens[rest], untouched[rest]) if reference else None
        return objective(images[:own], subject.tokens[:own], 0, held)["total"]

    def step(reference: int) -> None:
        model.zero_grad()
        loss(batch, reference).backward()

    times = alternate({str(number): (lambda number=number: step(number)) for number in (0, 4, 16)}, rounds)
    lines = []
    for number, share, target in ((4, "an eighth", 1.18), (16, "half", 1.55)):
        parameters = list(model.parameters())
        sizes = [
            saved_bytes(lambda parts=parts: loss(*parts), parameters)
            for parts in ((batch, number), (batch + number, 0))
        ]
        memory, limit = sizes[0] / sizes[1], f"{1 + number / batch:.3f} by FLOPs"
        name = f"keep-{number}-of-{batch}"
        lines += [
            Line(
                14,
                name,
                f"{share} as many reference samples / none",
                times.ratio(str(number), "0"),
                target,
                False,
                limit,
            ),
            Line(14, name, "memory / that of a batch of that size", Ratio(memory, memory, memory), 1.05, False, "1.00"),
        ]
    return lines


ROWS: dict[int, Callable[[int], list[Line]]] = {
    1: lora_linear,
    2: dora_linear,
    3: low_rank_linear,
    4: model_steps,
    5: dora_activations,
    6: closed_gates,
    7: gate_gradient,
    8: inference,
    11: contrastive,
    14: keeping,
}
# What one round costs decides how many there are: rounds of row, of 15 minutes on an idle core.
ROUNDS = {4: 5, 6: 7, 8: 7, 14: 7}
