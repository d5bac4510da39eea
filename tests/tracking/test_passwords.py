"""The password of tracking.uri is neither written nor printed, and found again when it is needed."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from http_servers import QuietHandler
from ports import free_port

from pipeline.config import Config, ConfigError, digest, flatten, load_config, override, to_yaml
from pipeline.doctor.machine import check_tracking
from pipeline.passwords import redact
from pipeline.tracking.mlflow.delivery import load_state, pending
from pipeline.tracking.mlflow.sync import sync
from pipeline.tracking.mlflow.uris import PasswordMissing, resolve_uri, without_user
from pipeline.tracking.tracker import open_tracker
from pipeline.training.cluster.distributed import read_world
from pipeline.training.directory import claim, tracked

PASSWORD = "s3cret+%"
QUOTED = "s3cret%2B%25"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:s3cret@host:5000/x", "http://me:***@host:5000/x"),
        ("at postgresql+psycopg2://me:s3/cr:et@db/x!", "at postgresql+psycopg2://me:***@db/x!"),
        ("postgresql://db/x?user=me&password=s3cret&a=b", "postgresql://db/x?user=me&password=***&a=b"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Ds3cret%3BA%3Db", None),
        ("'mysql://me:s3cret@h/x?passwd=s3cret'", "'mysql://me:***@h/x?passwd=***'"),
        ("https://host:5000/a/b and sqlite:////runs/a:b@c/mlflow.db", "https://host:5000/a/b and sqlite:////runs/a:b@c/mlflow.db"),
    ],
)  # fmt: skip
def test_every_spelling_of_a_password_is_hidden_and_nothing_else(text: str, shown: str | None) -> None:
    assert redact(text) == (shown or "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3D***%3BA%3Db")
    assert redact(redact(text)) == redact(text)


def test_a_left_out_password_comes_from_the_clients_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password that was left out comes from where the clients take it."""
    server, database = "http://me:***@host", "postgresql://me:***@host/db"
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pgpass"))
    with pytest.raises(PasswordMissing, match=r"http://me:\*\*\*@host is not stored; .*by MLFLOW_TRACKING_PASSWORD$"):
        resolve_uri(server, tmp_path)
    with pytest.raises(PasswordMissing, match=r"psycopg2://me:\*\*\*@host/db is .* by PGPASSWORD or ~/.pgpass$"):
        resolve_uri(database, tmp_path)
    (tmp_path / "pgpass").write_text(f"host:5432:db:me:{PASSWORD}\n")
    assert resolve_uri(database, tmp_path) == "postgresql+psycopg2://me@host/db"
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert resolve_uri(database, tmp_path) == f"postgresql+psycopg2://me:{QUOTED}@host/db"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    assert resolve_uri(server, tmp_path) == f"http://me:{QUOTED}@host"
    # The same address with its password goes before all others; another one is no answer.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:whole@host/db")
    assert resolve_uri(database, tmp_path) == "postgresql+psycopg2://me:whole@host/db"
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    with pytest.raises(PasswordMissing):
        resolve_uri(server, tmp_path)
    assert without_user(f"https://me:{QUOTED}@host:1/x") == "https://host:1/x"


def config_at(tmp_path: Path, uri: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(f"data: {{train: shards}}\nout: {tmp_path}/runs\ntracking: {{uri: '{uri}'}}\n")
    return load_config(path)


def test_only_the_config_itself_has_the_password(tmp_path: Path) -> None:
    """What is made of a config has no password and the config itself has it."""
    uri = f"https://me:{QUOTED}@host"
    config = config_at(tmp_path, uri)
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    again = load_config(tmp_path / "written.yaml")
    assert flatten(config)["tracking.uri"] == again.tracking.uri == "https://me:***@host"
    assert override(config, {"seed": 3}).tracking.uri == config.tracking.uri == uri
    assert digest(again) == digest(config)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml", [f"tracking={uri}", uri, f"data.workers={uri}"])
    assert "https://me:***@host" in str(caught.value)
    assert QUOTED not in str(caught.value)


class Guarded:
    """A real `mlflow server`, and before it a door that asks for name and password, as nginx or MLflow's own would."""

    def __init__(self, folder: Path, backend: str) -> None:
        port = free_port()
        self.log = folder / "server.log"
        self._inner = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--backend-store-uri", backend, "--artifacts-destination", str(folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([*command, "--workers", "1"], stdout=log, stderr=log, env=environment)
        self._door = ThreadingHTTPServer(("127.0.0.1", 0), _door_to(self._inner))
        self._thread = threading.Thread(target=self._door.serve_forever, daemon=True)
        self._thread.start()
        self.host = f"127.0.0.1:{self._door.server_address[1]}"
        self.uri = f"http://me:{QUOTED}@{self.host}"

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self._inner}/health", timeout=2).close()
                return
            except OSError:
                time.sleep(0.2)
        pytest.fail(self.log.read_text())

    def close(self) -> None:
        self._door.shutdown()
        self._door.server_close()
        self._process.terminate()
        self._process.wait()


def _door_to(inner: str) -> type[QuietHandler]:
    key = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()

    class Handler(QuietHandler):
        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, kind, answer = 401, "text/plain", b"who are you?"
            if self.headers.get("Authorization") == key:
                kept = {"Content-Type": self.headers.get("Content-Type") or "application/json"}
                request = urllib.request.Request(inner + self.path, body or None, kept, method=self.command)
                try:
                    with urllib.request.urlopen(request, timeout=60) as found:
                        status, kind, answer = found.status, found.headers["Content-Type"], found.read()
                except urllib.error.HTTPError as error:
                    status, kind, answer = error.code, error.headers["Content-Type"], error.read()
            self.send_response(status)
            self.send_header("Content-Type", kind or "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on  # noqa: N815 - the names that http.server calls

    return Handler


@pytest.fixture
def guarded(tmp_path: Path, store: str) -> Iterator[Guarded]:
    (tmp_path / "server").mkdir()
    server = Guarded(tmp_path / "server", store)
    try:
        server.wait_until_healthy()
        yield server
    finally:
        server.close()


def holds_the_password(folder: Path) -> list[Path]:
    secrets = (PASSWORD.encode(), QUOTED.encode())
    return [path for path in folder.rglob("*") if path.is_file() and any(one in path.read_bytes() for one in secrets)]


def wait_for_delivery(run_dir: Path, uri: str) -> None:
    """On a busy machine the shipper outlives the tracker that started it."""
    deadline = time.monotonic() + 90
    while pending(run_dir, load_state(run_dir, uri)) and time.monotonic() < deadline:
        time.sleep(0.1)


def test_a_run_at_a_guarded_server_keeps_no_password(
    guarded: Guarded, tmp_path: Path, store_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run at a guarded server leaves its password nowhere and can go on."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    # An experiment of its own: one that other tests have made in the session's store keeps its files elsewhere.
    config = override(config_at(tmp_path, guarded.uri), {"tracking.experiment": "guarded"})
    world = read_world({})
    run_dir = tmp_path / "runs" / "run"
    for step in range(2):  # the second time it continues: the config in its directory has no password, and is the same
        claim(run_dir, config, world)
        with tracked(config, run_dir, world, {}, 10) as tracker:
            tracker.metrics(step, {"loss": 0.5})
    assert f"uri: http://me:***@{guarded.host}" in (run_dir / "config.yaml").read_text()
    # All of it came to the store, and what came has no password either.
    wait_for_delivery(run_dir, guarded.uri)
    with pytest.raises(PasswordMissing, match="is not stored"):
        sync(run_dir)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    assert "401" in str(sync(run_dir).error)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    report = sync(run_dir)
    assert report.complete
    assert report.already > 0
    uploaded = list((tmp_path / "server").rglob("config.yaml"))
    assert len(uploaded) == 1
    assert f"uri: http://me:***@{guarded.host}" in uploaded[0].read_text()
    # A later stage has only what lies in the directory: it finds the password, or goes on without the server.
    written = load_config(run_dir / "config.yaml").tracking.uri
    with open_tracker(run_dir, run_name="run", uri=written, owns_status=False) as tracker:
        tracker.metrics(2, {"eval/id": 0.25})
    wait_for_delivery(run_dir, guarded.uri)
    assert sync(run_dir).sent == 0
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    with open_tracker(run_dir, run_name="run", uri=written, owns_status=False) as tracker:
        tracker.metrics(3, {"eval/id": 0.5})
    assert "is not stored; give the whole address" in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded.uri)
    assert (sync(run_dir).sent, sync(run_dir).pending) == (1, 0)
    assert f"http://me:***@{guarded.host}" in str(check_tracking(config))
    assert QUOTED not in str(check_tracking(config))
    (tmp_path / "config.yaml").unlink()  # the user's own
    assert holds_the_password(tmp_path) == []
    assert holds_the_password(store_dir) == []
    assert PASSWORD not in caplog.text
    assert QUOTED not in caplog.text


def test_a_sweep_leaves_the_password_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_folder: Callable[..., Path]
) -> None:
    from sweep_by_hand import lay_out

    from pipeline.data.shards.index import pack
    from pipeline.runs.sweep import SWEEP_FILE, read_state, trial_dir
    from pipeline.tuning.cluster.connect import _init_settings
    from pipeline.tuning.grid import Resources, load_grid
    from pipeline.tuning.mlflow_runs import SweepRuns
    from pipeline.tuning.trial import trial_config

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    pack(image_folder(), tmp_path / "shards")
    (tmp_path / "grid.yaml").write_text("grid: {rank: [2, 4]}\n")
    uri = f"http://me:{QUOTED}@127.0.0.1:9"  # nobody answers there
    config = override(config_at(tmp_path, uri), {"data.train": str(tmp_path / "shards")})
    grid, sweep_dir = load_grid(tmp_path / "grid.yaml"), tmp_path / "runs" / "run"
    for _ in range(2):  # the second time it continues
        trials = lay_out(config, grid)
        assert trial_config(sweep_dir, trials[0].name).tracking.uri == "http://me:***@127.0.0.1:9"
        with SweepRuns(sweep_dir, config, grid, trials) as record:
            states = {trial.name: read_state(trial_dir(sweep_dir, trial.name)) for trial in trials}
            record.close(states, "the table", complete=False)
    assert '"http://me:***@127.0.0.1:9"' in (sweep_dir / SWEEP_FILE).read_text()
    assert holds_the_password(tmp_path / "runs") == []
    # Ray writes the environment of its workers into its logs.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    given = _init_settings("127.0.0.1:1", Resources())["runtime_env"]["env_vars"]
    assert given["MLFLOW_TRACKING_URI"] == "http://me:***@127.0.0.1:9"
