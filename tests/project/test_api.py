"""The public Python API: the names in `pipeline`, and the examples in docs/python.md."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import pipeline
from pipeline.demo.assets import MODEL, asset


@pytest.fixture
def examples(repository: Path) -> list[str]:
    """The code blocks of the page."""
    return re.findall(r"```python\n(.*?)```", (repository / "docs" / "python.md").read_text(), flags=re.DOTALL)


def test_the_page_lists_every_public_name(examples: list[str]) -> None:
    listed = re.findall(r"\w+(?=,|  #)", re.sub(r"  #.*", "  #", examples[0]))
    assert sorted(listed) == sorted(pipeline.__all__)
    assert set(pipeline.__all__) == pipeline._HOMES.keys()


def test_every_public_name_is_found_and_documented() -> None:
    for name in pipeline.__all__:
        assert getattr(pipeline, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pipeline.nothing  # type: ignore[attr-defined]


def test_importing_the_package_imports_no_library() -> None:
    program = "import sys, pipeline; print(sorted({'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_example_of_an_own_loop_runs(examples: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    own_loop = examples[2].replace('"ViT-B-16-quickgelu", "openai"', f'"local-dir:{asset(MODEL)}"')
    assert own_loop != examples[2]
    exec(compile(own_loop, "docs/python.md", "exec"), {})
    assert capsys.readouterr().out == "144 of 144 blocks are open\n"


def test_the_example_of_a_run_runs(
    examples: list[str], image_folder: Callable[..., Path], tmp_path: Path, repository: Path
) -> None:
    from pipeline.data.eval.wds_layout import pack_eval
    from pipeline.data.shards.index import pack

    pack(image_folder(classes=3, each=20, size=32), tmp_path / "shards")
    pack_eval(image_folder(classes=3, each=4, size=32, seed=1), tmp_path / "eval" / "photos", templates="simple")
    rows = [{"key": "photos", "group": "id", "path": "photos"}]
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump({"name": "own", "root": "eval", "datasets": rows}))
    settings = [
        f"model.name=local-dir:{asset(MODEL)}",
        f"data.train={tmp_path / 'shards'}",
        f"out={tmp_path / 'runs'}",
        "name=from_python",
        "train.steps=2",
        "train.warmup_steps=0",
        "train.global_batch_size=8",
        "data.streams=4",
        "data.workers=0",
        "eval.workers=0",
        "model.pretrained=null",
        "tracking.enabled=false",
    ]
    program = re.sub(r"\[.*?\]", repr(settings), examples[1], count=1)
    program = program.replace("configs/own_data.yaml", str(repository / "configs" / "own_data.yaml"))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == f"{tmp_path / 'runs' / 'from_python'} 2 True"
    assert re.fullmatch(r"id \d\.\d{3}, gain [+-]\d\.\d{3}", lines[1])
    assert (tmp_path / "runs" / "from_python" / "eval" / "summary.json").is_file()
