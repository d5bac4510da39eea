"""The registered model behind MLflow's own server, over HTTP."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

from pipeline.config import Promote
from pipeline.handoff.predict import predict_files
from pipeline.handoff.promote import promote

START_SECONDS = 540


@contextmanager
def serving(model_uri: str, store: str, log: Path) -> Iterator[str]:
    """`mlflow models serve` in this environment, in a session of its own; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model_uri, "--env-manager", "local"]
    settings = {"MLFLOW_TRACKING_URI": store, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # mlflow starts uvicorn by name
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--timeout", "600"],
            env=os.environ | settings | {"PATH": path},
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_healthy(address, server, log)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def wait_until_healthy(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"{address}/ping", timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.5)
    raise AssertionError(f"no answer in {START_SECONDS} s: {log.read_text()[-2000:]}")


def ask(address: str, **request: Any) -> Any:
    body = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/invocations", body, headers), timeout=240) as answer:
        return json.load(answer)["predictions"]


@pytest.mark.slow
def test_the_champion_answers_over_http(
    make_run: Callable[..., Path], evaluated: Callable[[Path], Path], store: str, photo: bytes, tmp_path: Path
) -> None:
    """The champion answers a PNG over HTTP with the label it gives here."""
    run = evaluated(make_run("lora", True, directory=tmp_path / "run", seed=1))
    promote(run, "served", Promote(), champion=True, uri=store)
    (tmp_path / "photo.png").write_bytes(photo)
    (here,) = predict_files("models:/served@champion", [tmp_path / "photo.png"], uri=store, top_k=5)
    picture = base64.b64encode(photo).decode()
    with serving("models:/served@champion", store, tmp_path / "serve.log") as address:
        (there,) = ask(address, dataframe_records=[{"image": picture}])
        assert there["label"] == here["label"]
        assert there["labels"] == here["labels"]
        assert there["scores"] == pytest.approx(here["scores"], abs=1e-5)
        (other,) = ask(
            address, dataframe_records=[{"image": picture}], params={"class_names": ["a shoe", "a tree"], "top_k": 1}
        )
        assert other["label"] in ("a shoe", "a tree")
        (text,) = ask(address, dataframe_records=[{"text": "a photo of a shoe."}], params={"task": "embed_texts"})
        assert sum(value**2 for value in text["embedding"]) == pytest.approx(1, abs=1e-4)
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(address, dataframe_records=[{"path": str(tmp_path / "photo.png")}])
        assert refused.value.code == 400
        assert b"a server reads no files" in refused.value.read()


ASK_ALONE = """
import importlib.util, json, sys
import mlflow, pandas
assert importlib.util.find_spec("pipeline") is None
table = pandas.DataFrame({"image": [open(sys.argv[2], "rb").read()]})
print(json.dumps(mlflow.pyfunc.load_model(sys.argv[1]).predict(table).to_dict("records")))
"""


@pytest.mark.slow
def test_the_champion_needs_only_its_own_requirements(
    make_run: Callable[..., Path], evaluated: Callable[[Path], Path], store: str, photo: bytes, tmp_path: Path
) -> None:
    """The champion answers in an environment of nothing but its own requirements."""
    run = evaluated(make_run("lora", True, directory=tmp_path / "run", seed=1))
    promote(run, "alone", Promote(), champion=True, uri=store)
    (tmp_path / "photo.png").write_bytes(photo)
    (here,) = predict_files("models:/alone@champion", [tmp_path / "photo.png"], uri=store, top_k=5)
    model = registered_files("alone", store, tmp_path / "model")
    python = empty_environment(tmp_path / "venv", model / "requirements.txt")
    bare = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    answer = subprocess.run(
        [python, "-c", ASK_ALONE, str(model), str(tmp_path / "photo.png")],
        env=bare | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    shutil.rmtree(python.parents[1])  # gigabytes
    assert answer.returncode == 0, answer.stderr
    (there,) = json.loads(answer.stdout)
    assert there["labels"] == here["labels"]
    assert there["scores"] == pytest.approx(here["scores"], abs=1e-5)


def registered_files(name: str, store: str, target: Path) -> Path:
    """The champion's files, as a registry hands them to a server."""
    import mlflow

    mlflow.set_tracking_uri(store)
    return Path(mlflow.artifacts.download_artifacts(f"models:/{name}@champion", dst_path=str(target)))


def empty_environment(folder: Path, requirements: Path) -> Path:
    """A new environment with these requirements alone, from the index; returns its Python."""
    python = folder / "bin" / "python"
    if uv := shutil.which("uv"):
        commands = [[uv, "venv", "--python", sys.executable, folder], [uv, "pip", "install", "--python", python]]
    else:
        commands = [[sys.executable, "-m", "venv", folder], [python, "-m", "pip", "install"]]
    commands[1] += ["-r", requirements]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return python
