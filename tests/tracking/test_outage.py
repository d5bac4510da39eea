"""Training while the tracking store is away, hangs, dies and comes back; and while the trainer itself is killed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ports import free_port

from pipeline.tracking.journal import JOURNAL, Journal
from pipeline.tracking.locks import is_held
from pipeline.tracking.mlflow.delivery import SHIPPING_LOCK, load_state
from pipeline.tracking.mlflow.shipper import LOG_FILE
from pipeline.tracking.mlflow.sync import sync
from pipeline.tracking.tracker import RunTracker, open_tracker

Rows = Callable[[str], list[tuple[str, int, float, int]]]
Start = Callable[..., subprocess.Popen[str]]


class Server:
    """A real `mlflow server` on one port, in a process group of its own so that all of it can be killed at once."""

    def __init__(self, directory: Path, backend: str) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._directory, self._backend = directory, backend
        self._process: subprocess.Popen[bytes] | None = None
        self._inner: tuple[list[str], dict[str, str]] = ([], {})

    def start(self) -> None:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self._backend, "--artifacts-destination", str(self._directory / "artifacts")]
        self._run([*command, "--workers", "1"], environment)

    def start_again(self) -> None:
        """Run what `mlflow server` had run, without the seconds that the command itself takes to import."""
        self._run(*self._inner)

    def _run(self, command: list[str], environment: dict[str, str]) -> None:
        with (self._directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                time.sleep(0.2)
        pytest.fail((self._directory / "server.log").read_text())

    def signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            for child in psutil.Process(self._process.pid).children():
                self._inner = (child.cmdline(), child.environ())
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path, store: str) -> Iterator[Server]:
    one = Server(tmp_path, store)
    yield one
    one.kill()


def log_timed(tracker: RunTracker, steps: range, pause_s: float) -> list[float]:
    """Log one value a step; returns the seconds that each call took."""
    taken = []
    for step in steps:
        begin = time.perf_counter()
        tracker.metrics(step, {"loss": 1 / (step + 1), "gate/image.0.q_proj": 0.15})
        taken.append(time.perf_counter() - begin)
        time.sleep(pause_s)
    return taken


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s"
        time.sleep(0.1)


def all_shipped(run_dir: Path, uri: str) -> bool:
    return load_state(run_dir, uri).offsets.get(JOURNAL, 0) == (run_dir / JOURNAL).stat().st_size


def expected(steps: int) -> list[tuple[str, int]]:
    return [("gate/image.0.q_proj", step) for step in range(steps)] + [("loss", step) for step in range(steps)]


@pytest.mark.timeout(600)  # seconds of work, minutes when the machine is shared
def test_a_server_that_is_away_dies_and_hangs(
    tmp_path: Path, server: Server, metric_rows: Rows, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Server away from the start then killed and restarted then hanging."""
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("pipeline.tracking.tracker._WATCH_SECONDS", 0.5)
    calls: list[float] = []

    # Away from the start: the run goes on, says so once, ends quickly and names the command that catches up.
    early_dir = tmp_path / "early"
    early = open_tracker(early_dir, run_name="early", uri=server.uri, experiment="outage")
    wait_for(lambda: load_state(early_dir, server.uri).error is not None, 120, "noticing that nobody answers")
    calls += log_timed(early, range(100), 0.01)
    begin = time.monotonic()
    early.finish()
    assert time.monotonic() - begin < 10
    assert caplog.text.count("the journal keeps everything") == 1
    assert "200 values or files have not reached" in caplog.text
    assert f"selora track sync {early_dir}" in caplog.text
    assert sync(early_dir).error == "Connection refused"

    # The server comes, is killed in mid-run and comes back: the shipment catches up by itself.
    server.start()
    run_dir = tmp_path / "run"
    server.wait_until_healthy()
    report = sync(early_dir)
    assert report.complete
    assert [(key, step) for key, step, _, _ in metric_rows(str(report.run_id))] == expected(100)
    caplog.clear()
    tracker = open_tracker(run_dir, run_name="run", uri=server.uri, experiment="outage")
    calls += log_timed(tracker, range(100), 0.01)
    wait_for(lambda: all_shipped(run_dir, server.uri), 120, "shipping to the healthy server")
    server.kill()
    calls += log_timed(tracker, range(100, 300), 0.01)
    wait_for(lambda: load_state(run_dir, server.uri).error is not None, 60, "noticing the death")
    server.start_again()
    calls += log_timed(tracker, range(300, 400), 0.01)
    server.wait_until_healthy()
    wait_for(lambda: all_shipped(run_dir, server.uri), 120, "catching up")
    calls += log_timed(tracker, range(400, 410), 0.1)
    assert caplog.text.count("the journal keeps everything") == 1
    assert caplog.text.count("is back") == 1

    # The server takes connections and never answers: the end is bounded all the same.
    monkeypatch.setattr("pipeline.tracking.tracker._SERVER_WAIT_SECONDS", 5.0)
    server.signal(signal.SIGSTOP)
    tracker.artifact(run_dir / "run.json", "conf")
    begin = time.monotonic()
    tracker.finish()
    assert time.monotonic() - begin < 10
    assert f"selora track sync {run_dir}" in caplog.text
    server.signal(signal.SIGCONT)
    report = sync(run_dir)
    assert (report.error, report.pending) == (None, 0)
    assert [(key, step) for key, step, _, _ in metric_rows(str(report.run_id))] == expected(410)
    assert list((tmp_path / "artifacts").rglob("conf/run.json"))

    # On a machine shared with other jobs a call may be put to sleep by the kernel: one in a hundred is allowed that.
    assert sorted(calls)[int(len(calls) * 0.99)] < 0.05
    assert sorted(calls)[len(calls) // 2] < 0.005


TRAINER = """
import os, sys, time
from pathlib import Path
from pipeline.tracking.tracker import open_tracker
run_dir, uri, first, last, end = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
tracker = open_tracker(run_dir, run_name="crash", uri=uri, system_metrics=("here", 0.5))
tracker.params({"lr": 1e-5})
worker = os.fork()  # a data-loading worker: it holds every pipe of its parent open
if worker == 0:
    time.sleep(900)
    os._exit(0)
for step in range(first, last):
    tracker.metrics(step, {"loss": step + first / 1000})
print("logged", worker, tracker._shipper._process.pid, flush=True)
if end == "wait":
    time.sleep(900)
os.kill(worker, 9)
tracker.finish()
"""


@pytest.mark.timeout(600)
def test_a_killed_trainer_resumes_into_the_same_run(
    tmp_path: Path, store: str, metric_rows: Rows, python: Start
) -> None:
    """Killed trainer loses nothing and resumes into the same run."""
    from mlflow import MlflowClient

    run_dir = tmp_path / "crash"

    def crash(first: int, last: int, *, group_signal: bool) -> None:
        trainer = python(TRAINER, run_dir, store, first, last, "wait")
        assert trainer.stdout is not None
        word, worker, shipper = trainer.stdout.readline().split()
        assert word == "logged"
        if group_signal:  # what Slurm or a terminal sends to everybody must not end the shipment
            wait_for(lambda: load_state(run_dir, store).offsets != {}, 120, "the first shipment")
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(int(shipper), number)
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
        workers.append(int(worker))

    workers: list[int] = []
    try:
        crash(0, 50, group_signal=True)
        wait_for(lambda: not is_held(run_dir / SHIPPING_LOCK), 120, "the end of the orphaned shipment")
        run_id = str(load_state(run_dir, store).run_id)
        assert MlflowClient(store).get_run(run_id).info.status == "KILLED"
        assert [step for key, step, _, _ in metric_rows(run_id) if key == "loss"] == list(range(50))
        crash(40, 80, group_signal=False)  # and at once again, while the orphan may still be shipping
        last = python(TRAINER, run_dir, store, 60, 100, "finish")
        output = last.communicate()[0]
        assert last.returncode == 0, output
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    assert "selora track sync" not in output
    assert sync(run_dir).sent == 0
    rows = [(step, value) for key, step, value, _ in metric_rows(run_id) if key == "loss"]
    firsts = [0] * 50 + [40] * 30 + [60] * 20  # a value belongs to the attempt that wrote it first
    assert rows == [(step, step + first / 1000) for step, first in zip(range(100), firsts, strict=True)]
    system = [step for key, step, _, _ in metric_rows(run_id) if key == "system/here/system_memory_usage_megabytes"]
    assert system == list(range(len(system)))
    client = MlflowClient(store)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    tag = run.data.tags["selora.run"]
    assert len(client.search_runs([run.info.experiment_id], f"tags.`selora.run` = '{tag}'")) == 1


def test_dead_shipper_is_said_at_the_end_and_sync_delivers(
    tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tracker = open_tracker(tmp_path / "run", run_name="run", uri=store)
    assert tracker._shipper is not None
    tracker._shipper._process.kill()
    tracker.metrics(0, {"loss": 1.0})
    tracker.finish()
    assert "1 values or files have not reached" in caplog.text
    assert sync(tmp_path / "run").sent == 1


def test_run_that_is_being_shipped_is_left_alone_by_sync(tmp_path: Path, store: str) -> None:
    run_dir = tmp_path / "run"
    with open_tracker(run_dir, run_name="run", uri=store) as tracker:
        tracker.metrics(0, {"loss": 1.0})
        wait_for(lambda: is_held(run_dir / SHIPPING_LOCK), 120, "the start of the shipment")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.tracking.mlflow.sync._LOCK_SECONDS", 0.0)
            report = sync(run_dir)
        assert report.sent == 0
        assert "is delivering this run right now" in str(report.error)
    assert sync(run_dir).complete


def test_without_mlflow_there_is_the_journal_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with caplog.at_level(logging.WARNING), open_tracker(tmp_path / "run", run_name="run") as tracker:
        tracker.metrics(0, {"loss": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        f"tracking: mlflow is not installed; {tmp_path / 'run'} has the journal only"
    ]
    assert (tmp_path / "run" / JOURNAL).exists()
    assert not (tmp_path / "run" / LOG_FILE).exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_server_given_later_gets_a_run_that_began_without_one(
    tmp_path: Path, store: str, metric_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_tracker(tmp_path / "run", run_name="run", enabled=False) as tracker:
        tracker.metrics(0, {"loss": 1.0})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    report = sync(tmp_path / "run")
    assert (report.uri, report.sent) == (store, 1)
    journal = Journal(tmp_path / "run")
    journal.metrics(1, {"loss": 0.5})
    journal.close()
    assert sync(tmp_path / "run").sent == 1
    assert [step for _, step, _, _ in metric_rows(str(report.run_id))] == [0, 1]
