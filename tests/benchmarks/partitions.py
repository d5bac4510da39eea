"""python tests/benchmarks/partitions.py [--ranks 2] [--layers 8] [--stages 2 3]: each rank's memory with a large base.

Prints the peak memory of each rank, beyond what it used before the model was built, next to the size of the base. The
base has random weights and 32-pixel images, so nearly all of its memory is weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 32, "width": 1024, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 1024, "heads": 16},
}


class Peak(threading.Thread):
    """Peak anonymous memory (RssAnon) of this process, sampled 50 times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.most_bytes = _anonymous()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.most_bytes = max(self.most_bytes, _anonymous())


def _anonymous() -> int:
    """Without files that are mapped, such as the weights on the disk, which the system takes back at will."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon: this needs Linux")


def measure(folder: Path, settings: list[str]) -> None:
    """One rank."""
    import deepspeed  # noqa: F401 - imports do not count as memory of the model

    from pipeline.config import load_config
    from pipeline.demo.assets import FINETUNE, asset
    from pipeline.training.run import train

    peak = Peak()
    peak.start()
    train(load_config(asset(FINETUNE), settings))
    peak.over.set()
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(peak.most_bytes - peak.start_bytes))


def run(folder: Path, ranks: int, stage: int) -> list[int]:
    """Bytes of each rank."""
    wanted = {
        "name": f"zero_{stage}",
        "out": folder / "runs",
        "model.name": f"local-dir:{folder / 'base'}",
        "data.train": folder / "clothing_train",
        "adapter.rank": 16,
        "train.zero_stage": stage,
        "train.steps": 3,
        "train.global_batch_size": 4 * ranks,
        "data.streams": 4 * ranks,
        "tracking.enabled": "false",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [__file__, "--measure", str(folder), *(f"{key}={value}" for key, value in wanted.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def write_base(folder: Path, layers: int) -> int:
    """A base with so many layers in each tower on the disk as safetensors; returns its bytes."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {key: value | {"layers": layers} if isinstance(value, dict) else value for key, value in BASE.items()}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    state = open_clip.create_model(f"local-dir:{folder}", load_weights=False).state_dict()
    weights = {name: value.contiguous() for name, value in state.items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return sum(value.nbytes for value in weights.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8, help="of each tower, 100 MB for one of both")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # the checkout, where it is not installed
    if arguments.measure is not None:
        measure(arguments.measure, arguments.settings)
        return
    from pipeline.demo.assets import unpack

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        unpack(folder, "clothing_train.tar.gz")
        size = write_base(folder / "base", arguments.layers)
        print(f"base of {size / 1e9:.2f} GB, a rank's share of it {size / arguments.ranks / 1e9:.2f} GB")
        for stage in arguments.stages:
            found = " ".join(f"{each / 1e9:.2f}" for each in run(folder, arguments.ranks, stage))
            print(f"ZeRO {stage}, GB of ranks 0 to {arguments.ranks - 1}: {found}", flush=True)


if __name__ == "__main__":
    main()
