"""A tiny CLIP, its data and a benchmark of two sets, on which a trial takes a second of training."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ports import free_port

from pipeline.config import Config, load_config, to_yaml
from pipeline.runs.sweep import read_state, trial_dir
from pipeline.tuning.grid import Grid, load_grid

PATIENCE = 2400.0  # seconds; a busy machine stretches a trial a hundredfold


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path], tiny_clip: Path) -> Path:
    """A folder with shards/ (96 images of 4 classes), clip/ and bench.yaml (an id and a shift set)."""
    from pipeline.data.eval.wds_layout import write_wds_eval
    from pipeline.data.shards.index import pack
    from pipeline.data.sources.formats import read_source

    root = tmp_path_factory.mktemp("tiny")
    pack(image_folder(classes=4, each=24, size=40), root / "shards", samples_per_shard=16)
    shutil.copytree(tiny_clip, root / "clip")
    rows = []
    for seed, (key, group) in enumerate((("own", "id"), ("other", "shift"))):
        source = read_source(image_folder(classes=4, each=6, size=40, seed=seed))
        write_wds_eval(source.samples, root / key, classnames=source.classes, templates=["a {c}"])
        rows.append({"key": key, "group": group, "path": key})
    (root / "bench.yaml").write_text(yaml.safe_dump({"name": "tiny", "datasets": rows}))
    return root


@pytest.fixture(scope="session")
def known(tiny: Path, image_folder: Callable[..., Path]) -> Path:
    """A benchmark with the id set of `tiny` and a shift set whose classes are those that the untouched model sees."""
    return write_known(tiny, image_folder(classes=4, each=10, size=40, seed=5))


def write_known(root: Path, images: Path) -> Path:
    """Write ROOT/known.yaml, for the model in ROOT/clip: there is something to keep, although the model is random."""
    import torch

    from pipeline.data.eval.batches import eval_loader
    from pipeline.data.eval.wds_layout import open_eval_set, write_wds_eval
    from pipeline.data.images import normalize
    from pipeline.data.sources.formats import read_source
    from pipeline.model.clip import load_clip

    clip, source = load_clip(f"local-dir:{root / 'clip'}"), read_source(images)
    write_wds_eval(source.samples, root / "draft", classnames=source.classes, templates=["a {c}"])
    draft = open_eval_set(root / "draft")
    pixels = next(iter(eval_loader(draft, clip.preprocess_cfg, batch_size=len(source.samples), workers=0))).images
    with torch.no_grad():
        model: Any = clip.model
        seen = model.encode_image(normalize(pixels, clip.preprocess_cfg["mean"], clip.preprocess_cfg["std"]))
        names = model.encode_text(clip.tokenizer([f"a {name}" for name in source.classes or ()]))
    likeness = torch.nn.functional.normalize(seen, dim=-1) @ torch.nn.functional.normalize(names, dim=-1).T
    labels = (likeness - likeness.mean(0)).argmax(1)  # several classes, most of which the model gets right
    labels = torch.where(torch.arange(len(labels)) % 3 == 0, labels, likeness.argmax(1))
    samples = [replace(one, cls=int(label)) for one, label in zip(source.samples, labels, strict=True)]
    write_wds_eval(samples, root / "known", classnames=source.classes, templates=["a {c}"])
    rows = [{"key": "own", "group": "id", "path": "own"}, {"key": "known", "group": "shift", "path": "known"}]
    (root / "known.yaml").write_text(yaml.safe_dump({"name": "known", "datasets": rows}))
    return root / "known.yaml"


@pytest.fixture
def make_config(tiny: Path, tmp_path: Path) -> Callable[..., Config]:
    """make("key=value", ..) -> twelve steps of 16, checkpoints every four, the journal alone, below tmp_path/runs."""
    content = {
        "name": "sweep",
        "out": str(tmp_path / "runs"),
        "model": {"name": f"local-dir:{tiny / 'clip'}"},
        "adapter": {"kind": "lora", "rank": 4},
        "gate": {"lr": 0.002},
        "train": {
            "lr": 0.001,
            "warmup_steps": 2,
            "steps": 12,
            "global_batch_size": 16,
            "log_every": 1,
            "gates_every": 4,
            "checkpoint_every": 4,
        },
        "data": {
            "train": str(tiny / "shards"),
            "streams": 8,
            "shuffle_window": 8,
            "workers": 0,
            "templates": ["a {c}", "the {c}", "{c}"],
        },
        "eval": {"benchmark": str(tiny / "bench.yaml"), "workers": 0, "preprocessing": "fast"},
        "tracking": {"enabled": False},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return lambda *overrides: load_config(path, list(overrides))


@pytest.fixture
def make_grid(tmp_path: Path) -> Callable[[str], Grid]:
    """make(text) -> the grid that a file with this text holds."""

    def make(text: str) -> Grid:
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        return load_grid(path)

    return make


def _rank(rank: int, world: int, port: int, sweep_dir: Path, name: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from pipeline.tuning.trial import train_stage

    multiprocessing.set_start_method("fork", force=True)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    train_stage(sweep_dir, name)
    os._exit(0)


def _alone(sweep_dir: Path, name: str) -> None:
    from pipeline.tuning.trial import run_trial

    multiprocessing.set_start_method("fork", force=True)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    run_trial(sweep_dir, name)
    os._exit(0)


@pytest.fixture
def by_hand(fork_server: Any) -> Callable[..., None]:
    """run(sweep_dir, name, world=2): a trial's two stages without Ray, the first on so many ranks."""

    def run(sweep_dir: Path, name: str, world: int = 2) -> None:
        port = free_port()
        ranks = [
            fork_server.Process(target=_rank, args=(rank, world, port, sweep_dir, name))
            for rank in range(world if world > 1 else 0)
        ]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(300)
            assert each.exitcode == 0
        rest = fork_server.Process(target=_alone, args=(sweep_dir, name))
        rest.start()
        rest.join(300)
        assert rest.exitcode == 0

    return run


def losses_of(run_dir: Path) -> dict[int, float]:
    """step -> loss, as the journal of a run has it."""
    found = {}
    journal = run_dir / "journal.jsonl"
    for line in journal.read_text().splitlines() if journal.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line may be half written while we look
        if record["kind"] == "metrics" and "train/loss" in record["values"]:
            found[record["step"]] = record["values"]["train/loss"]
    return found


def statuses_of(run_dir: Path) -> list[str]:
    """The statuses that a run's journal holds, in their order: one RUNNING for each time that a training began."""
    lines = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [line["status"] for line in lines if line["kind"] == "status"]


class Sweep:
    """`selora sweep` as a process of its own, watched by its files and killed where it hurts."""

    def __init__(self, config: Config, grid: str, folder: Path, *arguments: str, **environment: str) -> None:
        self.directory = Path(config.out) / config.name
        (folder / "sweep.yaml").write_text(to_yaml(config))
        (folder / "grid.yaml").write_text(grid)
        self.log = folder / "sweep.log"
        self.home = folder / "home"
        self.home.mkdir(exist_ok=True)
        self._command = [
            sys.executable,
            "-m",
            "pipeline",
            "sweep",
            str(folder / "sweep.yaml"),
            str(folder / "grid.yaml"),
        ]
        self._command += arguments
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self._environment = inherited | {"HOME": str(self.home)} | environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Sweep:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        return self

    def wait(self) -> int:
        """The exit code."""
        assert self._process is not None
        return self._process.wait(PATIENCE)

    def run(self) -> int:
        return self.start().wait()

    def signal(self, number: int, *, group: bool = False) -> None:
        """To the command alone, or to its whole process group as a terminal does."""
        assert self._process is not None
        (os.killpg if group else os.kill)(self._process.pid, number)

    def processes(self) -> list[psutil.Process]:
        """Everything that the command has started and that lives."""
        assert self._process is not None
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def text(self) -> str:
        return self.log.read_text()

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for something that the files of the sweep show."""
        assert self._process is not None
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self._process.poll() is None, f"the sweep ended before {what}:\n{self.text()}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.text()}"
            time.sleep(0.02)

    def run_dir(self, name: str) -> Path:
        return trial_dir(self.directory, name)

    def state(self, name: str) -> Any:
        return read_state(self.run_dir(name))

    def kill_rank_0(self, name: str, step: int) -> None:
        """kill -9 the writer of a trial's journal once it holds the loss of `step`; its lock says who that is."""
        self.until(lambda: max(losses_of(self.run_dir(name)), default=0) >= step, f"step {step} of {name}")
        pid = int((self.run_dir(name) / ".journal.lock").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)

    def losses(self, name: str) -> dict[int, float]:
        return losses_of(self.run_dir(name))

    def statuses(self, name: str) -> list[str]:
        return statuses_of(self.run_dir(name))

    def end(self) -> None:
        """Leave nothing behind."""
        if self._process is None:
            return
        for each in [*self.processes()]:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    """command(config, grid text, *arguments, **environment) -> the command, not started yet; ended with the test."""
    made: list[Sweep] = []

    def make(config: Config, grid: str, *arguments: str, **environment: str) -> Sweep:
        folder = tmp_path / f"command-{len(made)}"
        folder.mkdir()
        made.append(Sweep(config, grid, folder, *arguments, **environment))
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture
def write_trial_results() -> Callable[..., None]:
    """write(run_dir, id) -> a finished trial with this id at kept >= 0.95 and at the other floors, and at α = 1."""
    from pipeline.files import replace_json
    from pipeline.runs.results import reported_at, write_floors
    from pipeline.runs.sweep import write_state

    def write(run_dir: Path, id_: float) -> None:
        means = {"id": (id_, 0.1), "shift": (0.76, -0.04)}
        summary = {
            "groups": {name: {"mean": mean, "change": change, "missing": []} for name, (mean, change) in means.items()},
            "datasets": {name: {"group": name, "value": value, "change": by} for name, (value, by) in means.items()},
            "forgetting": 0.04,
        }
        for folder in (run_dir / "eval", run_dir / reported_at(0.5)):
            replace_json(folder / "summary.json", summary)
        floors = {name: {"alpha": 0.5, "id": id_, "kept": 0.95} for name in ("0.99", "0.95", "0.9")}
        write_floors(run_dir / "eval", {"floor": 0.95, "floors": floors})
        write_state(run_dir, status="finished")

    return write
