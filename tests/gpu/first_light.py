"""First light: whether everything runs, agrees and is fast on a card.

    python tests/gpu/first_light.py --out DIR            on a card, at most 8 minutes
    python tests/gpu/first_light.py --out DIR --tiny     every stage on a CPU, with a tiny model

Writes first_light.md and first_light.json into DIR after every stage. Exits with 1 where a check does not hold.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "--tiny" in sys.argv:  # before torch is imported: threads of a tiny model only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]

from findings import Findings  # noqa: E402
from setting import CARD, TINY, Setting, machine  # noqa: E402

# Stage -> its module, in the order of what must be known first.
STAGES = {
    "card": "feeding",
    "unit_tests": "feeding",
    "data": "training_runs",
    "runs": "training_runs",
    "numerics": "steps",
    "engine": "steps",
    "speed": "steps",
    "compiled": "steps",
    "evaluation": "feeding",
    "loader": "feeding",
    "profile": "steps",
    "ways": "steps",
    "throughput": "training_runs",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/first_light"), help="where tables and logs go")
    parser.add_argument("--minutes", type=float, help="time for all stages (default: 8, with --tiny 30)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, which also runs on a CPU")
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    arguments = parser.parse_args(argv)
    about = machine()
    if not arguments.tiny and "CPU" in about["card"]:
        parser.error("no CUDA device here; --tiny runs every stage on a CPU")
    minutes = arguments.minutes or (30 if arguments.tiny else 8)
    findings = Findings(arguments.out.absolute(), about, minutes)
    with tempfile.TemporaryDirectory(prefix="first-light-") as work:
        setting = Setting(TINY if arguments.tiny else CARD, Path(work), findings)
        for name, module in STAGES.items():
            if arguments.only and name not in arguments.only:
                continue
            if not setting.has(20, name):
                continue
            _run(name, module, setting)
    findings.write()
    print(f"\n{len(findings.failed)} of {len(findings.checks)} checks fail; {findings.folder / 'first_light.md'}")
    return 1 if findings.failed else 0


def _run(name: str, module: str, setting: Setting) -> None:
    """A stage that breaks is a check that fails; the next one may still find something."""
    with setting.findings.stage(name):
        try:
            getattr(importlib.import_module(module), name)(setting)
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            setting.findings.check(f"{name} runs to its end", False, f"{type(error).__name__}: {error}"[:300])


if __name__ == "__main__":
    sys.exit(main())
