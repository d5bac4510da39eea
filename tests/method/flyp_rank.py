"""One rank of the tests of both losses: `python flyp_rank.py RANK WORLD DIRECTORY` writes its gradients there.

Also imported by the test for the one-rank reference.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.method.adapter import adapter_parameters, attach_adapter, blocks, gate_scores
from pipeline.method.contrastive import flyp_loss
from pipeline.method.linear import DoRALinear
from pipeline.method.penalty import gate_penalty
from pipeline.method.sigmoid import sigmoid_loss

BATCH = 16
# Both losses, without and with positives by class.
CASES = [(name, classes) for name in ("contrastive", "sigmoid") for classes in (False, True)]


class TwoTowers(nn.Module):
    """Two small towers; one LoRA and one DoRA block in each, trained adapters, one gate closed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8))
        self.text = nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 8))
        self.logit_scale = nn.Parameter(torch.full((1,), 2.5))
        self.logit_bias = nn.Parameter(torch.full((1,), -6.0))
        attach_adapter({"image.0": (self.image, "0"), "text.0": (self.text, "0")}, rank=3, kind="lora")
        attach_adapter({"image.2": (self.image, "2"), "text.2": (self.text, "2")}, rank=3, kind="dora")
        with torch.no_grad():
            for block in blocks(self).values():
                block.lowrank.lora_B.normal_(std=0.5)
                if isinstance(block, DoRALinear):
                    block.magnitude.mul_(1.1)
            gate_scores(self)[0].fill_(0.05)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        towers = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return *towers, self.logit_scale.exp()


def labels() -> Tensor:
    """Classes of the batch: some on one rank, some on all, two rows without."""
    return torch.tensor([0, 0, 1, -1, 2, 2, 2, 0, 1, 3, 2, -1, 0, 4, 4, 1])


def gradients(rank: int, world: int, name: str = "contrastive", classes: bool = False) -> dict[str, Tensor]:
    """Loss and gradients of this rank's share of the batch, averaged over ranks as DDP and DeepSpeed do.

    name: contrastive or sigmoid.
    """
    model = TwoTowers()
    generator = torch.Generator().manual_seed(5)
    images, texts = torch.randn(BATCH, 12, generator=generator), torch.randn(BATCH, 10, generator=generator)
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    positives = labels()[share] if classes else None
    outputs = model(images[share], texts[share])
    if name == "sigmoid":
        image_features, text_features, scale = outputs
        loss = sigmoid_loss(image_features, text_features, scale, model.logit_bias, labels=positives)
    else:
        loss = flyp_loss(*outputs, labels=positives)
    (loss + gate_penalty(gate_scores(model))).backward()
    parameters = adapter_parameters(model) | {"logit_scale": model.logit_scale, "logit_bias": model.logit_bias}
    out = {"loss": loss.detach()} | {name: p.grad for name, p in parameters.items() if p.grad is not None}
    if world > 1:
        for tensor in out.values():
            dist.all_reduce(tensor)
            tensor /= world
    return out


def main() -> None:
    rank, world, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    for name, classes in CASES:
        torch.save(gradients(rank, world, name, classes), directory / f"rank{rank}-{name}-{classes}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
