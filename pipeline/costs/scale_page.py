"""docs/scaling.md, printed from the formulas of scale.py and the measurements named below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.costs import goodput, scale
from pipeline.costs.goodput import Nodes
from pipeline.costs.scale import CAPTION_TOKENS, Hardware, Recompute, vit_shape

RANK, BATCH, MICRO = 16, 512, 64
# Texts are cut to the longest caption of their batch.
SHAPES = {name: shape.with_captions() for name, shape in scale.SHAPES.items()}
VITS = ("vit_small_patch16_224", "vit_base_patch16_224")
REFERENCE = 64  # reference images and texts of a step with section keep, over all ranks
RANKS = (4, 8, 16, 64, 256)
NODES = (1, 2, 4, 8, 16, 32, 64)
LINKS = (25.0, 400.0)
# Measured on one core: decode and crop of a 96 kB photograph, ms (torchvision path and PIL path).
DECODE_MS = (("fast", 2.4), ("reference", 3.9))
IMAGE_BYTES = 110_000  # mean of ImageNet's training files
_MB, _GB = 1e6, 1e9

_INTRODUCTION = f"""# Scaling

Printed from `pipeline/costs/scale.py`; a test checks that the page is current. **Computed** numbers follow from shapes
by the formulas there, **measured** ones name their machine. Adapters of rank {RANK} on all six projections of both
towers, gates on, texts of {CAPTION_TOKENS} tokens, and `train.train_rest=none` unless stated otherwise.
"""

# Printed by tests/benchmarks/roofline.py, whose test compares them.
_STEP = """## What a step keeps and how long it computes (traced on shapes, ViT-B/16 at 512 images, bf16)

`python tests/benchmarks/roofline.py` runs one step on tensors without values. Kept is what the forward leaves for the
backward. An operation takes as long as its FLOPs at 650 TFLOPS or its bytes at 2.8 TB/s, which large products and
copies reach on an H100; compiled, element-wise work joins the product that reads it. Loading and the network
are not in it, so it is what a card can reach at best. MFU counts four times the multiply-accumulates of pairs with
texts of 77 tokens, over 989 TFLOPS. Texts have 16 tokens and QuickGELU keeps its input alone, unless stated otherwise.

| step | keeps, GB | eager, ms | MFU, % | compiled, ms | MFU, % |
| --- | --: | --: | --: | --: | --: |
| LoRA r16, stock QuickGELU, texts of 77 | 49.1 | 206 | 21 | 147 | 29 |
| LoRA r16, texts of 77 | 39.8 | 176 | 24 | 147 | 29 |
| LoRA r16 | 32.1 | 145 | 29 | 123 | 35 |
| DoRA r16 | 33.9 | 157 | 27 | 125 | 34 |
| full | 32.7 | 155 | 27 | 132 | 32 |
"""

_MEASURED = """## Measured and not measured

- One and two ranks on two cores of an x86 server (`python tests/benchmarks/scaling.py`: the demo's gated LoRA of
  rank 64, ZeRO 1, gloo, one thread per rank): 133 and 217 images/s, so 82 % of twice the speed, with 6.5 % of the time
  in collectives. A rank sent 18.68 MB per step; the formulas give 18.68.
- One rank with two workers on two cores, shards of 64 MB from a web server held to about 7 MB/s, 256 steps of 0.3 s:
  after its first batch the rank waited 54 s for shards with `data.read_ahead=0`, up to 19 s at a time, and 1 s with
  1 or 2. The wait for the first batch, 19 to 24 s, stays.
- Two ranks on two cores, a base of 2.63 GB (`python tests/benchmarks/partitions.py --layers 24`): under ZeRO 3 at most
  2.8 GB on rank 0, which reads the base for both, and 2.6 GB on rank 1, of which 1.3 are its share and most of the rest
  layers that are gathered for a moment; under ZeRO 2, 3.6 GB on each. The more ranks, the smaller the share.
- An H200 computed for 86 ms in an eager step of LoRA r16 at 256 images and for 64 ms in a compiled one; half of the
  table's times at 512 images are 73 and 61. The steps took 136 and 94 ms, and longer under DeepSpeed, because the host
  launches kernels more slowly than the card computes them (docs/gpu.md). Efficiencies on this page leave that out.
- Slurm, ssh hosts and a Ray cluster of hosts with their own addresses, cut links and lost nodes were run on one machine
  (tests/launch), to test behaviour, not speed.
- No number on this page was measured on several GPU nodes. Before you reserve 64 nodes, run `selora doctor --launch` on
  two of them: it measures the bandwidth of the collectives, which these tables take from the data sheet.
"""


def page() -> str:
    """The whole page."""
    parts = [_INTRODUCTION, _traffic(), _memory(), _large_batches(), _STEP, _efficiency(), _strong(), _goodput(),
             _data(), _MEASURED]  # fmt: skip
    return "\n".join(parts)


def _traffic() -> str:
    rows = []
    for shape in SHAPES.values():
        for rest in (False, True):
            trained = shape.trained(RANK, rest=rest)
            moved = [scale.gradient_traffic(stage, shape.parameters, trained, 64) / _MB for stage in (0, 2, 3)]
            rows.append([shape.name, "all" if rest else "none", f"{trained / 1e6:.2f}", *(f"{x:,.0f}" for x in moved)])
    loss = [[shape.name, *(f"{scale.contrastive_traffic(b, shape.embed, 64) / _MB:.1f}" for b in (512, 4096, 32768))]
            for shape in SHAPES.values()]  # fmt: skip
    return (
        "## Bytes over the network per step and rank (computed, 64 ranks)\n\n"
        "Weights and gradients, MB. ZeRO 1 and 2 all-reduce the gradients and gather the new values. ZeRO 3 gathers\n"
        "the frozen weights twice a step: with adapters only that is 23 to 46 times the traffic of ZeRO 2, so take it\n"
        "only where the model does not fit.\n\n"
        + _table(["model", "train_rest", "trained, M", "ZeRO 0", "ZeRO 1, 2", "ZeRO 3"], rows)
        + "\nThe contrastive gather and its backward, MB, by global batch:\n\n"
        + _table(["model", "512", "4,096", "32,768"], loss)
    )


def _memory() -> str:
    rows = []
    for shape in SHAPES.values():
        for stage in (1, 2, 3):
            found = [
                scale.rank_memory(shape, stage, ranks, trained=shape.trained(RANK), images=16) / _GB for ranks in RANKS
            ]
            rows.append([shape.name, str(stage), *(f"{value:.2f}" for value in found)])
    return (
        "## Memory per rank (computed, GB, 16 images a rank, bf16 activations)\n\n"
        "fp32 weights + gradients + AdamW + activations, without the allocator's slack (count on 10 to 20 % more).\n\n"
        + _table(["model", "ZeRO", *(f"{ranks} ranks" for ranks in RANKS)], rows)
    )


def _large_batches() -> str:
    ways = (Recompute(), Recompute(layers=True), Recompute(micro_batch=16), Recompute(micro_batch=16, layers=True))
    vits = [vit_shape(f"timm:{name}") for name in VITS]
    cases = [(shape, images, "") for shape in (*SHAPES.values(), *vits) for images in (64, 512)]
    cases += [(SHAPES["ViT-B-16"], images + REFERENCE // 8, " with keep") for images in (64, 512)]
    rows = []
    for shape, images, more in cases:
        found = [
            scale.rank_memory(shape, 1, 8, trained=shape.trained(RANK), images=images, recompute=way) / _GB
            for way in ways
        ]
        rows.append([shape.name + more, str(images), *(f"{value:.1f}" for value in found)])
    passes = ["passes over the towers", "", *(str(way.passes(512)) for way in ways)]
    return (
        "## Larger batches (computed, GB on each of 8 ranks, ZeRO 1, bf16 activations)\n\n"
        "`train.activation_checkpointing` recomputes the inside of each layer, `train.micro_batch_size=16` each\n"
        "forward: less is kept, and a step makes 3 or 4 passes over the towers instead of 2, so it computes 1.5 or 2\n"
        "times as long. A test measures on a small CLIP that the formulas are right. With section keep,\n"
        f"`keep.batch_size={REFERENCE}` adds 8 reference images and texts to those of a rank.\n\n"
        + _table(["model", "images a rank", "whole", "checkpointing", "micro-batches", "both"], [*rows, passes])
    )


def _goodput() -> str:
    rows, head = [], ("model", "nodes", "days between failures", "best interval, steps", "minutes")
    for name in ("ViT-B-16", "ViT-bigG-14"):
        shape, machine = SHAPES[name], Hardware()
        for nodes in NODES:
            ranks = nodes * machine.cards
            trained = shape.trained(RANK)
            step = scale.step_seconds(shape, MICRO, machine)
            step += scale.communication_seconds(shape, 1, ranks, trained=trained, images=MICRO, machine=machine)
            cluster, job = Nodes(nodes), scale.checkpoint_job(step, trained)
            best, often = goodput.recommend(job, cluster), goodput.simulate(job, cluster, 100)
            lost = max(0.0, goodput.slowest(nodes, cluster.jitter) - 1)
            row = [name, str(nodes), f"{cluster.mtbf_s / 86400:,.1f}", f"{best.every:,}"]
            rows.append(
                [*row, f"{best.every * step / 60:.0f}", f"{best.share:.1%}", f"{often.share:.1%}", f"{lost:.1%}"]
            )
    return (
        "## Checkpoints and failing nodes (simulated)\n\n"
        "From failure to failure (`pipeline/costs/goodput.py`): a node fails every 6,000 hours, a restart takes 5\n"
        "minutes, a node's step time varies by 2 % and all wait for the slowest, a checkpoint stops the cards while\n"
        "it is copied to the host and is written behind them. Goodput is the share of time that ends in the result.\n"
        "`selora sweep --plan` prints this for its own trials and `train.checkpoint_every`.\n\n"
        + _table([*head, "goodput", "with 100 steps", "lost to stragglers"], rows)
    )


def _efficiency() -> str:
    rows = []
    for shape in SHAPES.values():
        for link in LINKS:
            for stage in (1, 3):
                found = [_share(shape.name, stage, nodes, MICRO, link) for nodes in NODES]
                rows.append([shape.name, f"{link:.0f}", str(stage), *(f"{100 * value:.0f}" for value in found)])
    return (
        f"## Efficiency with {MICRO} images per rank (computed, percent of computing time, nothing overlapped)\n\n"
        f"Nodes of 8 cards that reach {100 * scale.MFU:.0f} % of 989 TFLOPS (compiled steps, see the table above),\n"
        "one link per node, Gbit/s. A lower bound: reduction overlaps with the backward pass in practice. The global\n"
        "batch grows with the nodes.\n\n"
        + _table(["model", "link", "ZeRO", *(f"{n} node{'s' * (n > 1)}" for n in NODES)], rows)
    )


def _strong() -> str:
    nodes = [n for n in NODES if 8 * n <= BATCH]
    rows = [
        [shape.name, f"{link:.0f}", *(f"{100 * _share(shape.name, 1, n, BATCH // (8 * n), link):.0f}" for n in nodes)]
        for shape in SHAPES.values()
        for link in LINKS
    ]
    return (
        f"## The paper's global batch of {BATCH} on more nodes (computed, percent, ZeRO 1)\n\n"
        "One fine-tuning does not need many nodes. A sweep does: it runs trials in parallel.\n\n"
        + _table(["model", "link", *(f"{n} node{'s' * (n > 1)}" for n in nodes)], rows)
    )


def _data() -> str:
    rows = []
    for shape in SHAPES.values():
        rate = MICRO / scale.step_seconds(shape, MICRO, Hardware())
        cores = [f"{scale.loader_cores(rate, ms):.1f}" for _, ms in DECODE_MS]
        rows.append([shape.name, f"{rate:,.0f}", *cores, f"{8 * scale.store_gbit(rate, IMAGE_BYTES):.1f}"])
    return (
        "## Feeding the cards (computed from measured decoding times)\n\n"
        f"Decoding and cropping a 96 kB photograph took {DECODE_MS[0][1]} ms (`data.preprocessing=fast`) and "
        f"{DECODE_MS[1][1]} ms (`reference`) of one core\n(measured, x86 server core). "
        "The store's Gbit/s are per node of 8 cards in the first epoch; later ones come from the cache.\n\n"
        + _table(["model", "images/s per card", "cores per card, fast", "reference", "store, Gbit/s per node"], rows)
    )


def _share(name: str, stage: int, nodes: int, micro: int, link: float) -> float:
    shape = SHAPES[name]
    machine = Hardware(link_gbit=link)
    return scale.efficiency(shape, stage, nodes, trained=shape.trained(RANK), images=micro, machine=machine)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
