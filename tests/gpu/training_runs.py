"""Stages that start `selora train` as a user does: killed and resumed, against fp32, and end to end at full speed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from setting import ROOT, Setting

BF16 = "model.precision=bf16"
STEPS, KILL_AT = 40, 15
# Of the loss of a step that was done twice, before and after the kill: atomic sums differ in their last bits.
RESUMED_WITHIN = 1e-2
BF16_WITHIN, SCORES_WITHIN = 2e-2, 1e-2


def _picture(folder: Path, sides: tuple[int, int], number: int) -> None:
    """A smooth picture with noise, as heavy as a photograph of its size."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(number)
    coarse = Image.fromarray(draw.integers(0, 256, (12, 12, 3)).astype("uint8"))
    smooth = np.asarray(coarse.resize((sides[1], sides[0]), Image.Resampling.BICUBIC)).astype("float32")
    pixels = np.clip(smooth + draw.normal(0, 14, smooth.shape), 0, 255).astype("uint8")
    file = folder / f"class {number % 16}" / f"{number:05d}.jpg"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, quality=92)


def data(setting: Setting) -> None:
    """Make pictures of 16 classes and pack them."""
    from pipeline.data.shards.index import pack

    size, photos = setting.size, setting.work / "photos"
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(partial(_picture, photos, size.sides), range(size.images), chunksize=16))
    pack(photos, setting.shards, samples_per_shard=max(64, size.images // 4), force=True)
    total = sum(file.stat().st_size for file in setting.shards.glob("*.tar"))
    setting.findings.table("Images", ("number", "kB each"), [(size.images, total / size.images / 1e3)])


def config(setting: Setting) -> Path:
    """The options that all runs share; JSON is YAML."""
    options = {
        "model": {"name": setting.model},
        "adapter": {"rank": 4 if setting.tiny else 16},
        "gate": {"lr": 0.01},
        "train": {
            "steps": STEPS,
            "global_batch_size": setting.size.train_batch,
            "warmup_steps": 5,
            "lr": 1e-4,
            "log_every": 1,
            "gates_every": 10,
            "checkpoint_every": 10,
        },
        "data": {"train": str(setting.shards), "streams": 4, "shuffle_window": 64, "workers": 1},
        "tracking": {"enabled": False},
        "out": str(setting.work / "runs"),
    }
    file = setting.work / "config.yaml"
    file.write_text(json.dumps(options))
    return file


@dataclass
class Run:
    """One run of `selora train`, which is killed without warning on its way and then continued."""

    setting: Setting
    name: str
    overrides: tuple[str, ...]
    kill: bool = True
    killed_at: int | None = None
    code: int | None = None
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def log(self) -> Path:
        return self.setting.findings.folder / f"run-{self.name}.log"

    def start(self) -> None:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        env["OMP_NUM_THREADS"] = "1"  # many run side by side
        command = [sys.executable, "-m", "pipeline", "train", str(self.setting.work / "config.yaml")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, f"name={self.name}", *self.overrides], stdout=log, stderr=log, env=env, cwd=self.setting.work
            )

    def look(self) -> bool:
        """Kill it if its time has come; whether it is over."""
        assert self._process is not None
        if self._process.poll() is not None:
            self.code = self._process.returncode
            return True
        step = max(self.losses(), default=0)
        if self.kill and self.killed_at is None and step >= KILL_AT:
            self.end()
            self.killed_at = step
            self.start()
        return False

    def end(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def records(self) -> list[dict[str, Any]]:
        """What the journal holds; a line that is still being written is left out."""
        file, found = self.setting.work / "runs" / self.name / "journal.jsonl", []
        for line in file.read_text().splitlines() if file.is_file() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record.get("kind") == "metrics":
                found.append(record)
        return found

    def losses(self) -> dict[int, float]:
        """Step -> its loss; the journal keeps the first of a step that was done twice."""
        found = [(record["step"], record["values"].get("train/loss")) for record in self.records()]
        return {step: loss for step, loss in found if loss is not None}

    def printed(self) -> dict[int, list[float]]:
        """Step -> its losses in the log, two where the step was done before and after the kill."""
        found: dict[int, list[float]] = {}
        for step, loss in re.findall(r"^step (\d+)/\d+ loss (\S+)", self.log.read_text(), flags=re.MULTILINE):
            found.setdefault(int(step), []).append(float(loss))
        return found

    def scores(self) -> dict[str, float]:
        """The gates at the last record."""
        for record in reversed(self.records()):
            if found := {name: value for name, value in record["values"].items() if name.startswith("gate/")}:
                return found
        return {}

    def twice(self) -> list[float]:
        """Relative differences of the losses of steps that were done before and after the kill."""
        return [abs(v[0] - v[-1]) / max(1e-9, abs(v[0])) for v in self.printed().values() if len(v) > 1]


def _plans(setting: Setting) -> dict[str, tuple[str, ...]]:
    """Name -> options of each run. On a CPU two of them: each takes a core for a minute."""
    micro = max(1, setting.size.train_batch // 2)
    plans = {
        "fp32": ("train.compile=false",),
        **{f"bf16-z{stage}": (BF16, "train.compile=false", f"train.zero_stage={stage}") for stage in (0, 3)},
        "bf16-compiled": (BF16, "train.compile=true"),
        "bf16-dora": (BF16, "train.compile=false", "adapter.kind=dora"),
        "bf16-small": (
            BF16,
            "train.compile=false",
            f"train.micro_batch_size={micro}",
            "train.activation_checkpointing=true",
        ),
    }
    return {name: plans[name] for name in ("fp32", "bf16-z0")} if setting.tiny else plans


def runs(setting: Setting) -> None:
    """Every way of training, killed by -9 and continued, against fp32 without a kill."""
    config(setting)
    every = [Run(setting, name, plan, kill=name != "fp32") for name, plan in _plans(setting).items()]
    for run in every:
        run.start()
    deadline, open_runs = time.monotonic() + min(setting.findings.left - 20, setting.size.run_seconds), list(every)
    try:
        while open_runs and time.monotonic() < deadline:
            open_runs = [run for run in open_runs if not run.look()]
            time.sleep(0.2)
    finally:
        for run in open_runs:
            run.end()
    _compare(setting, every)


def _compare(setting: Setting, every: list[Run]) -> None:
    findings, reference, rows = setting.findings, every[0], []
    for run in every:
        own, other = run.losses(), reference.losses()
        off = [abs(own[s] - other[s]) / abs(other[s]) for s in own if s in other]
        scores = [abs(value - reference.scores().get(name, value)) for name, value in run.scores().items()]
        worst, last = max(run.twice(), default=float("nan")), max(own, default=0)
        final = own[last] if own else float("nan")
        rows.append((run.name, run.code, run.killed_at, len(run.twice()), worst, last, final,
                     max(off, default=float("nan")), max(scores, default=float("nan"))))  # fmt: skip
        findings.check(f"{run.name} ends by itself", run.code == 0, f"code {run.code} at step {last}")
        if run.code != 0:
            print(run.log.read_text()[-1500:], flush=True)
        if run.kill:
            findings.check(
                f"{run.name}: losses after the kill are those before", worst < RESUMED_WITHIN, f"{worst:.1e}"
            )
        if run is not reference and run.overrides[:1] == (BF16,) and "dora" not in run.name:
            worst = max(off, default=float("nan"))
            findings.check(f"{run.name}: loss within 2 % of fp32", worst < BF16_WITHIN, f"{worst:.2%}")
            worst = max(scores, default=float("nan"))
            findings.check(f"{run.name}: scores within 0.01 of fp32", worst < SCORES_WITHIN, f"{worst:.1e}")
    head = ("run", "exit code", "killed at", "steps done twice", "their difference", "last step", "loss",
            "loss, to fp32", "scores, to fp32")  # fmt: skip
    findings.table(
        "selora train, killed and resumed", head, rows, "Differences are relative, those of scores absolute."
    )


def throughput(setting: Setting) -> None:
    """`selora train` end to end, loader and checkpoints included, ten steps at a time."""
    config(setting)
    cores, batch, rows = len(os.sched_getaffinity(0)), setting.size.batches[-1], []
    for name, compiled in (("end to end, compiled", "true"), ("end to end, eager", "false")):
        if setting.tiny and compiled == "true":  # minutes of a C++ compiler
            continue
        if not setting.has(20 if setting.tiny else 75, name):
            break
        plan = (BF16, f"train.compile={compiled}", f"train.global_batch_size={batch}", "train.log_every=10",
                f"train.checkpoint_every={STEPS}", f"data.workers={1 if setting.tiny else min(14, cores)}")  # fmt: skip
        run = Run(setting, name.split()[-1], plan, kill=False)
        run.start()
        deadline = time.monotonic() + max(20, setting.findings.left - 15)
        while not run.look() and time.monotonic() < deadline:
            time.sleep(0.2)
        if run.code is None:
            run.end()
        speeds = [r["values"]["train/images_per_s"] for r in run.records() if "train/images_per_s" in r["values"]]
        rows.append((name, run.code, *(speeds + [None] * 4)[:4]))
        setting.findings.check(f"{name} ends by itself", run.code == 0, f"code {run.code}")
    setting.findings.table(
        f"selora train at {batch} images, images/s", ("run", "exit code", "1-10", "11-20", "21-30", "31-40"), rows
    )
