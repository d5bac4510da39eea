"""First light on a CPU: its stages run, its files hold what they found, and it needs neither ray nor mlflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from findings import Findings
from first_light import STAGES, main

SCRIPT = Path(__file__).with_name("first_light.py")


def test_a_stage_runs_on_a_cpu(tmp_path: Path) -> None:
    """The stage that calibrates RIDGE: its tables say what they were measured on."""
    assert main(["--tiny", "--only", "ways", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "first_light.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    blocks, ridges = found["tables"]
    assert [row[:3] for row in blocks["rows"]] == [["lora", "64 to 64", 4], ["dora", "64 to 64", 4]]
    assert all(ratio >= 1 for _, ratio in ridges["rows"])
    page = (tmp_path / "first_light.md").read_text()
    assert page.startswith(f"# First light on {found['machine']['card']}\n")
    assert "| kind | shape | rank | two_path | factors | dense |" in page


def test_a_failed_check_is_in_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    findings = Findings(tmp_path, {"card": "a card"}, minutes=1)
    with findings.stage("runs"):
        findings.check("the loss falls", False, "3.1 to 3.2")
        findings.table("Runs", ("run", "loss"), [("a", 1234.5), ("b|c", float("nan"))])
        findings.skip("speed", "no time left")
    page = (tmp_path / "first_light.md").read_text()
    assert "| the loss falls | 3.1 to 3.2 | **no** |" in page
    assert "| a | 1,234 |\n| b/c | - |" in page
    assert "- speed: no time left" in page
    assert "FAILS: the loss falls" in capsys.readouterr().out
    assert [check.claim for check in findings.failed] == ["the loss falls"]


def test_a_stage_that_breaks_fails_the_programme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import feeding

    monkeypatch.setattr(feeding, "card", lambda setting: setting.nothing)
    assert main(["--tiny", "--only", "card", "--out", str(tmp_path)]) == 1
    [check] = json.loads((tmp_path / "first_light.json").read_text())["checks"]
    assert check["found"].startswith("AttributeError")


def test_the_full_size_needs_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "--tiny" in capsys.readouterr().err


@pytest.fixture
def without_ray_and_mlflow(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine where neither is installed, for a process and all that it starts."""
    for name in ("ray", "mlflow"):
        (tmp_path / "absent" / name).mkdir(parents=True)
        message = f"No module named {name!r}"
        code = f"raise ModuleNotFoundError({message!r}, name={name!r})\n"
        (tmp_path / "absent" / name / "__init__.py").write_text(code)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "absent")}


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu(tmp_path: Path, without_ray_and_mlflow: dict[str, str]) -> None:
    """Trained, killed, resumed, timed and evaluated, with neither ray nor mlflow installed."""
    command = [sys.executable, str(SCRIPT), "--tiny", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=without_ray_and_mlflow, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "first_light.json").read_text())
    assert found["seconds"].keys() == STAGES.keys()
    assert found["left_out"].keys() == {"card", "targets of speed"}
    [runs] = [table for table in found["tables"] if table["title"].startswith("selora train, killed")]
    assert [row[:2] for row in runs["rows"]] == [["fp32", 0], ["bf16-z0", 0]]
    assert runs["rows"][1][3] > 0, "steps were done twice"
