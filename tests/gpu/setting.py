"""Where first light runs: the sizes of a card and of a CPU, scratch folders, and one clock for both."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from findings import Findings

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
# Dense bf16 FLOPs a second by the makers' data sheets, without sparsity.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
TINY_CLIP = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@dataclass(frozen=True)
class Size:
    """How large every stage is.

    Attributes:
        model: None for a tiny CLIP with random weights.
        batches: of a step, ascending; the middle one is where kinds are compared.
        train_batch: of the runs that are killed and resumed.
        images: photographs that are made, of `sides` pixels.
        repeats: of a timing.
    """

    model: str | None
    batches: tuple[int, ...]
    train_batch: int
    images: int
    sides: tuple[int, int]
    repeats: int
    shapes: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    workers: tuple[int, ...]
    run_seconds: float

    @property
    def middle(self) -> int:
        return self.batches[len(self.batches) // 2]


CARD = Size(
    model="ViT-B-16-quickgelu",
    batches=(128, 256, 512),
    train_batch=64,
    images=2048,
    sides=(370, 375),
    repeats=3,
    shapes=((768, 768), (768, 3072), (3072, 768), (512, 2048)),
    ranks=(16, 64, 128, 256),
    workers=(4, 8, 14),
    run_seconds=150,
)
TINY = Size(
    model=None,
    batches=(4, 8),
    train_batch=8,
    images=128,
    sides=(40, 44),
    repeats=1,
    shapes=((64, 64),),
    ranks=(4,),
    workers=(1,),
    run_seconds=400,
)


@dataclass(frozen=True)
class Setting:
    """What every stage is given."""

    size: Size
    work: Path
    findings: Findings

    @cached_property
    def device(self) -> torch.device:
        import torch

        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def tiny(self) -> bool:
        return self.size.model is None

    @property
    def shards(self) -> Path:
        return self.work / "shards"

    @cached_property
    def model(self) -> str:
        """Name of the model, as load_clip takes it."""
        if self.size.model is not None:
            return self.size.model
        folder = self.work / "tiny"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP, "preprocess_cfg": {}}))
        return f"local-dir:{folder}"

    @cached_property
    def peak(self) -> float | None:
        """Dense bf16 FLOPs a second of the card; None where it is not known."""
        name = self.findings.machine["card"]
        return next((peak for card, peak in PEAK.items() if card in name), None)

    def has(self, seconds: float, what: str) -> bool:
        """Whether so much time is left; noted where it is not."""
        if self.findings.left < seconds:
            self.findings.skip(what, "no time left")
            return False
        return True

    def timed(self, call: Callable[[], object], repeats: int | None = None) -> float:
        """Seconds of a call: the median, on a card by events, after two calls that warm up."""
        for _ in range(2):
            call()
        return median(self.once(call) for _ in range(repeats or self.size.repeats))

    def once(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def wait(self) -> None:
        """Until the card is idle."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def clean(self) -> None:
        """Give memory back and start the peak anew."""
        gc.collect()
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @property
    def peak_gb(self) -> float | None:
        """The most memory since `clean`; None on a CPU."""
        if self.device.type != "cuda":
            return None
        import torch

        return torch.cuda.max_memory_allocated() / 1e9


def machine() -> dict[str, str]:
    """What the figures belong to."""
    import torch

    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "a CPU (no figures of a card)"
    return {
        "card": card,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "cores": str(len(os.sched_getaffinity(0))),
    }
