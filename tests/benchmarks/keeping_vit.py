"""Reference images and a ViT: K-NN on a set that it was pretrained on, with and without `keep`.

    python tests/benchmarks/keeping_vit.py --out build/keeping                 # 3 seeds, two methods, three references
    python tests/benchmarks/keeping_vit.py --out build/keeping --table         # the table of what is finished

The ViT is the image tower of the demo's tiny CLIP as timm reads it. It learns the demo's ten classes of clothing. Its
source set are the groceries of the CLIP's pretraining: a fifth of them are the queries, none of which is a reference
image, and the rest is the bank. --out may be shared with keeping.py, whose data and --foreign this uses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from keeping import ALPHAS, FLOORS, fine_tune, prepare, spawn

from pipeline.data.eval.wds_layout import pack_eval
from pipeline.data.shards.index import load_index, open_shard
from pipeline.data.shards.members import sample_texts
from pipeline.demo.assets import MODEL, asset

METHODS = {
    "lora16": {"adapter.rank": "16", "adapter.towers": "[image]", "gate.enabled": "false", "train.lr": "2e-3"},
    "gated16": {"adapter.rank": "16", "adapter.towers": "[image]", "gate.lam": "0.3", "train.lr": "2e-3"},
    "full": {"adapter.kind": "full", "train.lr": "3e-4"},
}
KEPT = {"keep.weight": "3", "keep.batch_size": "16", "keep.texts": "null"}
REFERENCES: dict[str, dict[str, str]] = {
    "none": {"keep.weight": "0", "keep.images": "null", "keep.texts": "null"},
    "foreign": {**KEPT, "keep.images": "{foreign}"},
    "own": {**KEPT, "keep.images": "{reference}"},
}


class Case(NamedTuple):
    """One run."""

    method: str
    reference: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.reference}-s{self.seed}"


def prepare_vit(data: Path) -> None:
    """The ViT in timm's layout, its source set with bank and queries, and the benchmark."""
    _write_vit(data / "vit")
    source = data / "eval" / "groceries_source"
    if not (source / "train" / "nshards.txt").is_file():
        folders = _split(data)
        for split in ("test", "train"):
            pack_eval(folders / split, source, split=split, templates="simple", force=True)
    rows = [
        {"key": "clothing", "group": "id", "path": "clothing", "resize": "squash"},
        {"key": "groceries", "group": "source", "path": "groceries_source", "bank": "train"},
    ]
    content = {"name": "vit", "root": str(data / "eval"), "datasets": rows}
    (data / "vit.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _write_vit(folder: Path) -> None:
    """timm's own conversion of a CLIP's image tower, without its projection."""
    import timm
    from safetensors.torch import load_file, save_file
    from timm.models.vision_transformer import checkpoint_filter_fn

    size: dict[str, Any] = {"img_size": 64, "embed_dim": 128, "depth": 12, "num_heads": 4, "num_classes": 0}
    model: Any = timm.create_model("vit_base_patch16_clip_224", **size)
    tower = {k: v for k, v in load_file(asset(MODEL) / "open_clip_model.safetensors").items() if k.startswith("visual")}
    state = {k: v for k, v in checkpoint_filter_fn(tower, model).items() if not k.startswith("head")}
    model.load_state_dict(state)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    cfg = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "num_classes": 0}
    content = {"architecture": "vit_base_patch16_clip_224", "num_classes": 0, "model_args": size, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")


def _split(data: Path) -> Path:
    """The groceries as folders "test" (queries: every fifth image that is not a reference image) and "train"."""
    index, held = load_index(data / "reference"), set()
    for number, shard in enumerate(index.shards):
        tar = open_shard(index, number)
        held |= {hashlib.sha256(tar.read(i, "webp")).hexdigest() for i in range(shard.samples)}
    out = data / "groceries_split"
    for folder in sorted(_groceries(data).iterdir()):
        free = 0
        for file in sorted(folder.iterdir()):
            seen = hashlib.sha256(file.read_bytes()).hexdigest() in held
            free += not seen
            place = out / ("test" if not seen and free % 5 == 1 else "train") / folder.name / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    return out


def _groceries(data: Path) -> Path:
    """The groceries of the pretraining mix as class folders, by the last caption: "precise, broad" or "broad"."""
    folder, index = data / "groceries_images", load_index(data / "pretrain")
    for number, shard in enumerate(index.shards):
        tar = open_shard(index, number)
        for i in range(shard.samples):
            captions = sample_texts(tar, i, None)[1]
            if any(text.endswith(" in a store.") for text in captions):
                file = folder / captions[-1].rpartition(", ")[2] / f"{number}-{i}.webp"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(tar.read(i, "webp"))
    return folder


def run(out: Path, case: Case, steps: int) -> None:
    """Train and evaluate one case in this process."""
    options = {"seed": case.seed, "train.steps": steps, "model.name": f"timm:local-dir:{out / 'data' / 'vit'}"}
    fine_tune(out, "vit", case.name, "clothing_train", options | METHODS[case.method] | REFERENCES[case.reference])


class Curve(NamedTuple):
    """Accuracy on the own task and K-NN on the source set, by strength."""

    own: list[float]
    source: list[float]

    def at(self, floor: float) -> float:
        """The own task's accuracy at the largest strength that keeps `floor` of K-NN, linear between strengths."""
        alphas = np.linspace(0, 1, 1001)
        kept = np.interp(alphas, ALPHAS, self.source) / self.source[0]
        return float(np.interp(alphas[np.flatnonzero(kept >= floor)[-1]], ALPHAS, self.own))


def read_curve(out: Path, case: Case) -> Curve | None:
    """The curve of a finished case, None before."""
    file = out / "vit" / case.name / "eval" / "strength.json"
    if not file.is_file():
        return None
    levels = json.loads(file.read_text(encoding="utf-8"))["datasets"]
    if any(str(alpha) not in levels for alpha in ALPHAS):
        return None
    own, source = ([levels[str(alpha)].get(key, 0.0) for alpha in ALPHAS] for key in ("clothing", "groceries"))
    return Curve(own, source)


def table(out: Path, seeds: list[int]) -> str:
    """One row a method and reference: means over the seeds that are there, smallest and largest in brackets."""
    head = " | ".join(f"clothing at {floor:.0%} kept" for floor in FLOORS)
    lines = [f"| method | reference | seeds | clothing | K-NN groceries | {head} |", "|" + "---|" * (5 + len(FLOORS))]
    before = 0.0
    for method in METHODS:
        for reference in REFERENCES:
            curves = [c for seed in seeds if (c := read_curve(out, Case(method, reference, seed))) is not None]
            if curves:
                before = curves[0].source[0]
                values = [[c.own[-1] for c in curves], [c.source[-1] for c in curves]]
                values += [[c.at(floor) for c in curves] for floor in FLOORS]
                cells = [f"{100 * np.mean(v):.1f} ({100 * min(v):.1f} to {100 * max(v):.1f})" for v in values]
                lines.append(f"| {method} | {reference} | {len(curves)} | {' | '.join(cells)} |")
    return f"untouched: K-NN {100 * before:.1f}\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--references", choices=REFERENCES, nargs="+", default=list(REFERENCES))
    parser.add_argument("--foreign", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    if arguments.case:
        method, reference, seed = arguments.case
        run(out, Case(method, reference, int(seed)), arguments.steps)
        return
    if not arguments.table:
        prepare(out, arguments.foreign)
        prepare_vit(out / "data")
        for seed in arguments.seeds:
            for reference in arguments.references:
                for method in arguments.methods:
                    if read_curve(out, case := Case(method, reference, seed)) is None:
                        _spawn(out, case, arguments.steps)
    print(table(out, arguments.seeds))


def _spawn(out: Path, case: Case, steps: int) -> None:
    spawn(__file__, out, steps, out / "vit" / f"{case.name}.log", case)
    curve = read_curve(out, case)
    print(case.name, f"{curve.own[-1]:.3f} {curve.source[-1]:.3f}" if curve else "failed, see its log", flush=True)


if __name__ == "__main__":
    main()
