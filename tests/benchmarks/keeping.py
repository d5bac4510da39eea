"""Methods of keeping knowledge: the demo's tiny CLIP fine-tuned on two own tasks, with and without reference data.

    python tests/benchmarks/keeping.py --out build/keeping                        # everything: hours on two cores
    python tests/benchmarks/keeping.py --out build/keeping --world clothes --seeds 0 --methods lora64
    python tests/benchmarks/keeping.py --out build/keeping --table                # the tables of what is finished
    python tests/benchmarks/keeping.py --out build/keeping --figure docs/keeping.png

A finished run is not repeated. Each trains by `train`, is evaluated at five strengths by `evaluate_strength`, and
leaves its directory below OUT/WORLD. Foreign reference images are random crops of the photographs in --foreign FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from pipeline.config import load_config
from pipeline.data.eval.wds_layout import open_eval_set, pack_eval
from pipeline.data.shards.index import pack
from pipeline.demo.assets import FINETUNE, MODEL, asset, unpack
from pipeline.report.style import CYCLE, MARKERS, legend, panels
from pipeline.selection.kept import kept_of

ALPHAS = (0.0, 0.3, 0.5, 0.7, 1.0)
FLOORS = (0.99, 0.95, 0.90)
METHODS = {
    "full": {"adapter.kind": "full", "train.lr": "3e-4"},
    "lora16": {"adapter.rank": "16", "gate.enabled": "false"},
    "lora64": {"adapter.rank": "64", "gate.enabled": "false"},
    "lora64-fast": {"adapter.rank": "64", "gate.enabled": "false", "train.lr": "2e-3"},
    "gated64": {"adapter.rank": "64", "gate.lam": "0.3"},
    "lora64-class": {"adapter.rank": "64", "gate.enabled": "false", "train.lr": "2e-3", "train.positives": "class"},
}
# An exact number of the 144 blocks, and what it is compared with: as many blocks at random, a λ that ends with about
# as many, and LoRA on all blocks of a rank with about as many parameters.
for _count, _gated, _lam, _rank in (
    (12, "gated64-l1-fast", "1", 5),
    (34, "gated64-fast", "0.3", 16),
    (72, "gated64-l0.1-fast", "0.1", 32),
):
    METHODS |= {
        f"budget{_count}-fast": {"adapter.rank": "64", "gate.lam": "0", "gate.budget": str(_count), "train.lr": "2e-3"},
        f"random{_count}-fast": {"adapter.rank": "64", "adapter.random_k": str(_count), "train.lr": "2e-3"},
        _gated: {"adapter.rank": "64", "gate.lam": _lam, "train.lr": "2e-3"},
        f"lora{_rank}-fast": {"adapter.rank": str(_rank), "gate.enabled": "false", "train.lr": "2e-3"},
    }
KEPT = {"keep.weight": "3", "keep.batch_size": "16", "keep.texts": "general"}
REFERENCES: dict[str, dict[str, str]] = {
    "none": {"keep.weight": "0", "keep.texts": "null", "keep.images": "null"},
    "texts": {**KEPT, "keep.images": "null"},
    "foreign": {**KEPT, "keep.images": "{foreign}"},
    "own": {**KEPT, "keep.images": "{reference}"},
    "own-replay": {**KEPT, "keep.images": "{reference}", "keep.replay": "0.1"},
}
# The evaluated sets by world: the own task is the id group there, everything else is to be kept.
WORLDS = {
    "clothes": {"clothing": "id", "fashion": "shift", "grocery": "zero-shot", "emoji": "zero-shot",
                "clipart": "zero-shot", "emoji_names": "retrieval"},
    "emoji": {"emoji_new": "id", "clothing": "zero-shot", "fashion": "zero-shot", "grocery": "zero-shot",
              "clipart": "zero-shot"},
}  # fmt: skip


class Case(NamedTuple):
    """One run."""

    world: str
    method: str
    reference: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.reference}-s{self.seed}"


def prepare(out: Path, foreign: Path | None) -> None:
    """Unpack the demo's data, and make the two sets of emoji, the benchmarks and the foreign reference images."""
    data = unpack(out / "data")
    for world, groups in WORLDS.items():
        rows = [{"key": key, "group": group, "path": key} for key, group in groups.items()]
        content = {"name": world, "root": str(data / "eval"), "datasets": rows}
        (data / f"{world}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    if not (data / "eval" / "emoji_new").exists():
        folders = _new_emoji(data)
        pack(folders / "train", data / "emoji_new_train", samples_per_shard=512)
        pack_eval(
            folders / "test",
            data / "eval" / "emoji_new",
            templates=list(open_eval_set(data / "eval" / "emoji").templates or ()),
        )
    if foreign is not None and not (data / "foreign").exists():
        pack(_crops(foreign, data / "foreign_images"), data / "foreign", samples_per_shard=512)


def _new_emoji(data: Path) -> Path:
    """Emoji in a drawing style that the pretraining did not see, two of three for training and the third as test."""
    emoji, folder = open_eval_set(data / "eval" / "emoji"), data / "emoji_new_images"
    seen: Counter[int] = Counter()
    for (tar, number), label in zip(emoji.places, emoji.labels, strict=True):
        seen[label] += 1
        part = "test" if seen[label] % 3 == 2 else "train"
        file = folder / part / (emoji.classnames or ())[label] / f"{tar}-{number}.webp"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(emoji.tars[tar].read(number, "webp"))
    return folder


def _crops(photos: Path, folder: Path, number: int = 2048) -> Path:
    """Random square crops of at least a quarter of a photograph's height, scaled to the model's 64 pixels."""
    draw = np.random.default_rng(0)
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    (folder / "photo").mkdir(parents=True, exist_ok=True)
    for position, path in enumerate(files):
        image = Image.open(path).convert("RGB")
        image.thumbnail((1024, 1024))
        for i in range(position, number, len(files)):
            side = int(draw.uniform(0.25, 1) * min(image.size))
            x, y = int(draw.integers(image.width - side + 1)), int(draw.integers(image.height - side + 1))
            crop = image.crop((x, y, x + side, y + side)).resize((64, 64), Image.Resampling.BICUBIC)
            crop.save(folder / "photo" / f"{i:05d}.webp", quality=75)
    return folder


def run(out: Path, case: Case, steps: int) -> None:
    """Train and evaluate one case in this process."""
    train = {"clothes": "clothing_train", "emoji": "emoji_new_train"}[case.world]
    options = {"seed": case.seed, "train.steps": steps, "model.name": f"local-dir:{asset(MODEL)}"}
    fine_tune(out, case.world, case.name, train, options | METHODS[case.method] | REFERENCES[case.reference])


def fine_tune(out: Path, world: str, name: str, train_set: str, options: Mapping[str, object]) -> None:
    """Train a run into OUT/WORLD/NAME on a set of OUT/data, and evaluate it on OUT/data/WORLD.yaml at each strength.

    {foreign} and {reference} in options are the shards of reference images.
    """
    import torch

    from pipeline.data.storage.cache import Cache
    from pipeline.evaluation.datasets.benchmark import load_benchmark
    from pipeline.evaluation.datasets.dataset import Settings
    from pipeline.evaluation.strength import evaluate_strength
    from pipeline.training.run import train

    torch.set_num_threads(1)
    data, folder = out / "data", out / world
    fixed = {"name": name, "out": folder, "data.train": data / train_set, "tracking.enabled": "false"}
    filled = {k: str(v).format(foreign=data / "foreign", reference=data / "reference") for k, v in options.items()}
    train(load_config(asset(FINETUNE), [f"{key}={value}" for key, value in (fixed | filled).items()]))
    settings = Settings(batch_size=128, workers=0, preprocessing="fast", cache=Cache(out / "cache", 2 * 10**9))
    benchmark, results = load_benchmark(data / f"{world}.yaml"), folder / name / "eval"
    evaluate_strength(folder / name, benchmark, results, settings, baselines=folder / "baselines", alphas=ALPHAS)


class Curve(NamedTuple):
    """Accuracies of the own task and shares kept by strength, and what they say."""

    own: list[float]
    kept: list[float]
    worst: list[float]
    blocks: int | None

    def at_floor(self, floor: float) -> float:
        """The largest id between the evaluated strengths (linear) with kept >= floor, from the strongest down."""
        for right in range(len(self.kept) - 1, -1, -1):
            if self.kept[right] >= floor:
                return self.own[right]
            left = right - 1
            if left >= 0 and self.kept[left] >= floor:
                share = (self.kept[left] - floor) / (self.kept[left] - self.kept[right])
                return self.own[left] + share * (self.own[right] - self.own[left])
        return self.own[0]


def read_curve(out: Path, case: Case) -> Curve | None:
    """The curve of a finished case, None before."""
    run_dir = out / case.world / case.name
    file = run_dir / "eval" / "strength.json"
    if not file.is_file():
        return None
    datasets, groups = json.loads(file.read_text(encoding="utf-8"))["datasets"], WORLDS[case.world]
    if any(str(alpha) not in datasets for alpha in ALPHAS):
        return None  # of an earlier list of strengths
    own_key = next(key for key, group in groups.items() if group == "id")
    before = datasets["0.0"]
    levels = [_entries(groups, before, datasets[str(alpha)]) for alpha in ALPHAS]
    kept = [kept_of(entries) for entries in levels]
    latest = (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    state = json.loads((run_dir / "checkpoints" / latest / "state.json").read_text(encoding="utf-8"))
    gates = state["gate_map"]
    return Curve(
        own=[datasets[str(alpha)][own_key] for alpha in ALPHAS],
        kept=[each.mean for each in kept if each is not None],
        worst=[each.worst_share for each in kept if each is not None],
        blocks=sum(gate["open"] for gate in gates.values()) if gates else None,
    )


def _entries(groups: dict[str, str], before: dict[str, float], after: dict[str, float]) -> dict[str, dict[str, Any]]:
    return {
        key: {"group": group, "value": after[key], "baseline": before[key], "change": after[key] - before[key]}
        for key, group in groups.items()
    }


def table(out: Path, world: str, seeds: list[int]) -> str:
    """One row a method and reference: means over the seeds that are there, smallest and largest id in brackets."""
    head = "| run | reference | seeds | blocks | id | kept | worst | " + " | ".join(f"id at {f:.0%}" for f in FLOORS)
    lines = [f"{head} |", "|" + "---|" * (7 + len(FLOORS))]
    for method in METHODS:
        for reference in REFERENCES:
            cases = [Case(world, method, reference, seed) for seed in seeds]
            curves = [curve for case in cases if (curve := read_curve(out, case)) is not None]
            if curves:
                lines.append(_line(method, reference, curves))
    untouched = next(
        (c for m in METHODS for r in REFERENCES if (c := read_curve(out, Case(world, m, r, seeds[0])))), None
    )
    first = f"untouched: id {100 * untouched.own[0]:.1f}\n\n" if untouched else ""
    return first + "\n".join(lines)


def _line(method: str, reference: str, curves: list[Curve]) -> str:
    def cell(values: list[float]) -> str:
        low, high = f"{100 * min(values):.1f}", f"{100 * max(values):.1f}"
        return f"{100 * np.mean(values):.1f}" + (f" ({low} to {high})" if len(values) > 1 else "")

    blocks = [curve.blocks for curve in curves if curve.blocks is not None]
    cells = [
        method,
        reference,
        str(len(curves)),
        f"{np.mean(blocks):.0f}" if blocks else "",
        *(cell([getattr(curve, name)[-1] for curve in curves]) for name in ("own", "kept", "worst")),
        *(cell([curve.at_floor(floor) for curve in curves]) for floor in FLOORS),
    ]
    return f"| {' | '.join(cells)} |"


SHOWN = {"none": "no reference", "texts": "texts", "foreign": "foreign images, texts", "own": "own world, texts"}


def figure(out: Path, worlds: list[str], seeds: list[int], file: Path, method: str = "lora64-fast") -> None:
    """Draw each reference's curve from the untouched model (strength 0) to the fine-tuned one: means over the seeds."""
    titles = {"clothes": "photos of clothes", "emoji": "emoji in a new style"}
    drawing, axes = panels("Learned against kept, by reference data", len(worlds), narrow=False, height=3.6)
    for world, one in zip(worlds, axes, strict=True):
        for number, (reference, label) in enumerate(SHOWN.items()):
            cases = [Case(world, method, reference, seed) for seed in seeds]
            curves = [curve for case in cases if (curve := read_curve(out, case)) is not None]
            own, kept = (100 * np.mean([getattr(each, name) for each in curves], axis=0) for name in ("own", "kept"))
            one.plot(kept, own, label=label, color=CYCLE[number], marker=MARKERS[number], markersize=5)
        one.set_title(titles[world], loc="left")
        one.set_xlabel("kept (% of the untouched model, mean over the other datasets)")
        one.set_ylabel("accuracy on the own task (%)")
    legend(drawing, axes)
    drawing.savefig(file, dpi=120, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--world", choices=WORLDS, nargs="+", default=list(WORLDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--references", choices=REFERENCES, nargs="+", default=list(REFERENCES))
    parser.add_argument("--foreign", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the tables and run nothing")
    parser.add_argument("--figure", type=Path, help="draw the curves of what is finished, and run nothing")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = args.out.absolute()
    if args.case:
        world, method, reference, seed = args.case
        run(out, Case(world, method, reference, int(seed)), args.steps)
        return
    if args.figure:
        figure(out, args.world, args.seeds, args.figure)
        return
    if not args.table:
        prepare(out, args.foreign)
        cases = [
            Case(world, method, reference, seed)
            for world in args.world
            for seed in args.seeds
            for reference in args.references
            for method in args.methods
        ]
        todo = [case for case in cases if read_curve(out, case) is None]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda case: _spawn(out, case, args.steps), todo))
    for world in args.world:
        print(f"\n## {world}\n\n{table(out, world, args.seeds)}")


def _spawn(out: Path, case: Case, steps: int) -> None:
    spawn(__file__, out, steps, out / case.world / f"{case.name}.log", case)
    curve = read_curve(out, case)
    found = f"id {100 * curve.own[-1]:.1f}, kept {100 * curve.kept[-1]:.1f}" if curve else "failed, see its log"
    print(f"{case.world} {case.name}: {found}", flush=True)


def spawn(script: str, out: Path, steps: int, log: Path, case: Iterable[object]) -> None:
    """A process for each run: an engine leaves state behind that the next one must not see."""
    command = [sys.executable, script, "--out", str(out), "--steps", str(steps), "--case", *map(str, case)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)


if __name__ == "__main__":
    main()
