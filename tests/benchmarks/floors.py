"""Does a floor hold? α is chosen on one part of the images, and what is kept there is compared with the other part.

    python tests/benchmarks/floors.py --out build/keeping                    # every finished run of keeping.py in --out
    python tests/benchmarks/floors.py --out build/keeping --table            # the table of what is there

The runs are those of keeping.py, and α is chosen as `--strength auto` and a sweep with a floor do. A run that has been
looked at is not looked at again.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from keeping import METHODS, REFERENCES, WORLDS, Case, read_curve

from pipeline.files import replace_json

KEPT_FLOORS = (0.97, 0.95)
HELD_FILE = "held.json"


class Held(NamedTuple):
    """What one run kept at the strength that was chosen for a floor.

    Attributes:
        alpha: 0 where no strength above it keeps the floor.
        chosen_on: share kept on the images that α was chosen on.
        others: share kept on the other images.
    """

    floor: float
    alpha: float
    chosen_on: float
    others: float

    @property
    def miss(self) -> float:
        """How far the share kept on the other images is below the floor; 0 where it is not."""
        return max(0.0, self.floor - self.others)


def look(out: Path, case: Case, floors: Sequence[float]) -> None:
    """Choose a strength for each floor on the choosing part, and evaluate the model at it on the other images."""
    import torch

    from pipeline.config import Promote
    from pipeline.data.storage.cache import Cache
    from pipeline.evaluation.auto_strength import Strengths
    from pipeline.evaluation.datasets.benchmark import load_benchmark
    from pipeline.evaluation.datasets.dataset import Settings
    from pipeline.selection.floor import Floor

    torch.set_num_threads(1)
    run_dir = out / case.world / case.name
    benchmark = load_benchmark(out / "data" / f"{case.world}.yaml", out / "data" / "eval")
    others = benchmark.choose([row.key for row in benchmark.rows if row.group != "id"])
    settings = Settings(batch_size=128, workers=0, preprocessing="fast", cache=Cache(out / "cache", 2 * 10**9))
    strengths = Strengths(run_dir, others, run_dir / "held", settings, baselines=out / case.world / "baselines")
    found = []
    for floor in floors:
        chosen = strengths.largest(Floor.of(Promote(min_kept=floor)))
        kept = 1.0
        if chosen.alpha:
            kept = strengths.reported(chosen.alpha, run_dir / "held" / f"{chosen.alpha:g}", {}).summary["kept"]["mean"]
        found.append(Held(floor, chosen.alpha, floor + chosen.margins.get(chosen.alpha, 1 - floor), kept)._asdict())
    replace_json(run_dir / HELD_FILE, {"floors": found})


def read_held(out: Path, case: Case) -> list[Held]:
    """What was found of a run; empty before."""
    file = out / case.world / case.name / HELD_FILE
    return [Held(**each) for each in json.loads(file.read_text(encoding="utf-8"))["floors"]] if file.is_file() else []


def table(out: Path, cases: Iterable[Case]) -> str:
    """One row for each world, reference and floor, over all methods and seeds."""
    groups: dict[tuple[str, str, float], list[Held]] = defaultdict(list)
    for case in cases:
        for held in read_held(out, case):
            groups[case.world, case.reference, held.floor].append(held)
    head = ("world", "reference", "floor", "runs", "α", "kept where α was chosen", "kept elsewhere", "misses", "by")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [_line(world, reference, floor, found) for (world, reference, floor), found in groups.items()]
    for floor in sorted({floor for _, _, floor in groups}, reverse=True):
        lines.append(
            _line("all", "", floor, [each for key, found in groups.items() if key[2] == floor for each in found])
        )
    return "\n".join(lines)


def _line(world: str, reference: str, floor: float, found: Sequence[Held]) -> str:
    alphas, misses = [each.alpha for each in found], [each.miss for each in found if each.miss]
    by = f"{100 * mean(misses):.1f} points, {100 * max(misses):.1f} at most" if misses else ""
    cells = [
        world,
        reference,
        f"{100 * floor:g} %",
        str(len(found)),
        f"{min(alphas):g} to {max(alphas):g}" if min(alphas) < max(alphas) else f"{alphas[0]:g}",
        f"{100 * mean(each.chosen_on for each in found):.1f}",
        f"{100 * mean(each.others for each in found):.1f}",
        f"{len(misses)} of {len(found)}",
        by,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="that of keeping.py")
    parser.add_argument("--floors", type=float, nargs="+", default=list(KEPT_FLOORS))
    parser.add_argument("--world", choices=WORLDS, nargs="+", default=list(WORLDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--references", choices=REFERENCES, nargs="+", default=list(REFERENCES))
    parser.add_argument("--table", action="store_true", help="print the table and evaluate nothing")
    asked = parser.parse_args()
    out = asked.out.absolute()
    cases = [
        Case(world, method, reference, seed)
        for world in asked.world
        for reference in asked.references
        for method in asked.methods
        for seed in asked.seeds
    ]
    for case in cases if not asked.table else ():
        known = {held.floor for held in read_held(out, case)}
        if read_curve(out, case) is not None and not known >= set(asked.floors):
            look(out, case, asked.floors)
            print(case.world, case.name, *read_held(out, case), flush=True)
    print(table(out, cases))


if __name__ == "__main__":
    main()
