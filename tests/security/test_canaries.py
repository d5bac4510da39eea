"""Every secret that a user may have in an environment or an address, and a run: none is in its files and output."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from http_servers import serving_guarded

from pipeline.demo.assets import FINETUNE, MODEL, asset, unpack

# In no name of a file or a process by chance.
MARK = "canary-9e27"
STORE_PASSWORD = f"{MARK}-store"
SECRETS = {
    name: f"{MARK}-{name.lower()}"
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "HF_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "PGPASSWORD",
        "RAY_AUTH_TOKEN",
        "WANDB_API_KEY",
        "GITHUB_TOKEN",
    )
} | {"SELORA_STORE_PASSWORD": STORE_PASSWORD}


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[str]:
    unpack(tmp_path / "data", "clothing_train.tar.gz", "eval.tar.gz")
    with serving_guarded(tmp_path / "data/clothing_train", STORE_PASSWORD) as address:
        yield address


class Lines(threading.Thread):
    """The command lines of all processes, as anybody on the machine can see them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[str] = set()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.05):
            for process in psutil.process_iter(["cmdline"]):
                line = " ".join(process.info["cmdline"] or ())
                if MARK in line:
                    self.seen.add(line)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_secret_is_found_in_what_a_run_leaves(guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = tmp_path / "given.yaml", tmp_path / "out"
    config.write_text(
        f"base: {asset(FINETUNE)}\nmodel: {{name: 'local-dir:{asset(MODEL)}'}}\n"
        f"data: {{train: 'http://me:{STORE_PASSWORD}@{guarded}', streams: 8, workers: 1}}\n"
        "keep: {weight: 0, images: null, texts: null}\n"
        f"eval: {{benchmark: {tmp_path}/data/benchmark.yaml}}\n"
        "train: {steps: 4, global_batch_size: 8, checkpoint_every: 2, log_every: 1, gates_every: 2, warmup_steps: 1}\n"
    )
    environment = {**SECRETS, "SELORA_CACHE": str(out / "cache"), "HOME": str(out / "home")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # Processes of the chaos harness: they have the slow imports behind them.
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "chaos"))
    from chaos import _command, prepared

    server = prepared()
    for name in ("out", "out/home"):
        (tmp_path / name).mkdir()
    run, said, lines = out / "runs/run", "", Lines()
    lines.start()
    for argv in (
        ["train", config, f"out={out}/runs", "name=run"],
        ["evaluate", run],
        ["export", run, out / "model", "--to", "open_clip"],
        ["promote", run, "--name", "m", "--rule", "min_gain=-1", "max_forgetting=1", "min_kept=0"],
        ["track", "sync", run],
        ["report", run],
        ["config", config],
        ["train", config, f"out={out}/runs", "name=run", "data.train=http://me:wrong@127.0.0.1:9/x"],
    ):
        log = tmp_path / "said.log"
        log.unlink(missing_ok=True)
        process = server.Process(target=_command, args=([str(part) for part in argv], log, "any"))
        process.start()
        process.join(300)
        assert process.exitcode == (2 if "wrong" in str(argv[-1]) else 0), (argv, log.read_text())
        said += log.read_text()
    time.sleep(1)
    lines.over.set()
    lines.join()
    assert MARK not in said
    assert not lines.seen
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 20 and any(path.name == "mlflow.db" for path in files)
    assert [str(path) for path in files if MARK.encode() in path.read_bytes()] == []
    assert json.loads((run / "eval/summary.json").read_text())["groups"]
