"""The recipe of the images, executed: the steps that the Dockerfile runs build a working environment from the lock."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from requirements import lacking

ROOT = Path(__file__).parents[2]
STEPS = ("packages", "project", "server")


def test_the_dockerfile_runs_the_tested_steps() -> None:
    """The dockerfile runs the steps that are tested here and the one that needs nvcc."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    assert set(re.findall(r"docker/install\.sh (\w+)$", text, re.MULTILINE)) == {*STEPS, "operators"}


@pytest.mark.slow
def test_the_steps_build_a_working_environment(tmp_path: Path) -> None:
    """The steps build an environment in which selora trains and MLflow serves."""
    uv = shutil.which("uv", path=f"{os.environ['PATH']}:{ROOT}/.uv/bin")
    assert uv, "make env finds uv on PATH or installs it into .uv"
    source, venv = tmp_path / "src", tmp_path / "venv"
    source.mkdir()
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    for name in {name for line in copied for name in line.split()}:
        target = source / name
        target.parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, symlinks=True)  # as COPY does
        else:
            shutil.copy(ROOT / name, target)
    clean = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    clean |= {"PATH": f"{Path(uv).parent}:/usr/bin:/bin", "VENV": str(venv), "PYTHON": sys.executable}
    for step in STEPS:
        done = subprocess.run(
            [source / "docker" / "install.sh", step],
            cwd=source,
            env=clean,
            capture_output=True,
            text=True,
            timeout=1200,
        )
        if done.returncode and "client error" in done.stderr:
            lacking("registry", f"no package index here: {done.stderr[-300:]}")
        assert done.returncode == 0, f"{step}: {done.stderr[-3000:]}"

    def run(*command: str) -> str:
        done = subprocess.run(
            [venv / "bin" / command[0], *command[1:]],
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    script = (
        "import sys; from pathlib import Path; from pipeline.demo import assets; "
        "assert 'site-packages' in assets.__file__; assets.unpack(Path('data'), 'clothing_train.tar.gz'); "
        "print(assets.asset('finetune.yaml'), assets.asset('clip'))"
    )
    config, clip = run("python", "-c", script).split()
    run("selora", "train", config, f"model.name=local-dir:{clip}", "data.train=data/clothing_train", "train.steps=2",
        "train.global_batch_size=32", "tracking.enabled=false", "train.warmup_steps=1")  # fmt: skip
    assert (tmp_path / "runs" / "run" / "checkpoints" / "latest").read_text().strip() == "step-00000002"
    assert "psycopg2" in run(
        "python", "-c", "import boto3, psycopg2, flask_wtf, mlflow.server.auth as a; print(psycopg2)"
    )
    locked = re.findall(
        r'^name = "(torch|ray|mlflow|deepspeed)"\nversion = "([^"]+)"', (ROOT / "uv.lock").read_text(), re.M
    )
    for name, version in locked:
        assert (
            run("python", "-c", f"from importlib.metadata import version as v; print(v('{name}'))").strip() == version
        )
