"""The model card of exports and versions, and the push of an export to a hub."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from http_servers import QuietHandler, serving
from huggingface_hub import ModelCard
from PIL import Image

from pipeline.cli import main
from pipeline.config import Promote
from pipeline.handoff.card.facts import CardFacts
from pipeline.handoff.card.text import write_card
from pipeline.handoff.export import export
from pipeline.handoff.promote import promote
from pipeline.handoff.source import read_source
from pipeline.vectors.embedder import load_embedder


def test_a_card_says_what_was_learned_and_where_it_comes_from(
    make_run: Callable[..., Path], evaluated: Callable[[Path], Path], tmp_path: Path
) -> None:
    run = evaluated(make_run("lora", True, directory=tmp_path / "run", seed=1))
    summary = json.loads((run / "eval/summary.json").read_text())
    export(run, "open_clip", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    data: Any = card.data
    assert data.library_name == "open_clip" and data.pipeline_tag == "zero-shot-image-classification"
    found = {each.dataset_name: each.metric_value for each in data.eval_results or ()}
    assert found == {key: pytest.approx(row["value"], abs=1e-6) for key, row in summary["datasets"].items()}
    facts = json.loads((tmp_path / "out/selora.json").read_text())
    for key in ("weights_digest", "base_digest", "data_digest"):
        assert facts[key] in card.text
    assert "Learned and kept" in card.text and "local-dir:DIR" in card.text
    assert "licence of the base: not known" in card.text
    with Image.open(tmp_path / "out/results.png") as figure:
        assert figure.width > 400
    export(run, "peft", tmp_path / "peft", verify=False)
    text = (tmp_path / "peft/README.md").read_text()
    assert "names its base `base`" in text and "move the two together" in text


def test_results_of_retrieval_have_a_task_of_their_own(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("lora", True, directory=tmp_path / "run", seed=2)
    source = read_source(run)
    row = {"value": 0.5, "baseline": None, "change": None, "n": 8}
    datasets = {
        "pets": row | {"group": "zero-shot", "metric": "acc1"},
        "flickr30k": row | {"group": "retrieval", "metric": "mean_recall"},
    }
    results = {"benchmark": "b", "precision": "fp32", "groups": {}, "datasets": datasets}
    write_card(tmp_path, CardFacts("clip", source, "open_clip", results))
    data: Any = ModelCard.load(tmp_path / "README.md").data
    found = {each.dataset_name: each.task_type for each in data.eval_results or ()}
    assert found == {"pets": "zero-shot-image-classification", "flickr30k": "image-text-retrieval"}


def test_results_of_other_weights_are_not_in_a_card(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("lora", True, directory=tmp_path / "run", seed=2)
    (run / "eval").mkdir()
    summary = {"format": "selora-summary", "version": 1, "datasets": {}, "groups": {}, "model_digest": "0" * 64}
    (run / "eval/summary.json").write_text(json.dumps(summary))
    export(run, "open_clip", tmp_path / "out", verify=False)
    assert "were not evaluated" in (tmp_path / "out/README.md").read_text()
    assert not (tmp_path / "out/results.png").exists()


@pytest.mark.slow
def test_a_version_carries_its_card(
    make_run: Callable[..., Path], evaluated: Callable[[Path], Path], store: str, tmp_path: Path
) -> None:
    import mlflow

    run = evaluated(make_run("lora", True, directory=tmp_path / "run", seed=3))
    done = promote(run, "carded", Promote(), uri=store)
    version = mlflow.MlflowClient(tracking_uri=store, registry_uri=store).get_model_version("carded", str(done.version))
    assert "fine-tuned by selora" in str(version.description)
    mlflow.set_tracking_uri(store)
    files = Path(
        mlflow.artifacts.download_artifacts(f"models:/carded/{done.version}", dst_path=str(tmp_path / "files"))
    )
    data: Any = ModelCard.load(files / "README.md").data
    assert data.library_name == "mlflow"
    assert (files / "results.png").is_file()
    registered, own = load_embedder(f"models:/carded/{done.version}", uri=store), load_embedder(str(run))
    assert registered.digest == own.digest
    assert torch.equal(registered.texts(["a shoe"]), own.texts(["a shoe"]))


class Hub(QuietHandler):
    """As much of the hub as an upload of small files needs; `commits` gets the files of each commit."""

    commits: list[dict[str, bytes]]
    created: list[dict[str, Any]]
    refuse: bool

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuse:
            return self._answer(403, {"error": "no right to write"})
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            return self._answer(200, {"url": f"http://{self.headers['Host']}/me/clip", "name": "me/clip"})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            found = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files]
            return self._answer(200, {"files": found})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.commits.append({each["path"]: base64.b64decode(each["content"]) for each in files})
            url = f"http://{self.headers['Host']}/me/clip/commit/1"
            return self._answer(200, {"commitUrl": url, "commitOid": "1", "success": True, "hookOutput": ""})
        return self._answer(404, {})

    def _answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def hub(refuse: bool = False) -> Iterator[type[Hub]]:
    handler: Any = type("Handler", (Hub,), {"commits": [], "created": [], "refuse": refuse, "address": ""})
    with serving(handler) as address:
        handler.address = f"http://{address}"
        yield handler


def test_an_export_is_pushed_as_a_private_repository(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(make_run("lora", True)), str(tmp_path / "out")
    command = ["export", run, out, "--to", "peft", "--unverified", "--push", "me/clip"]
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main([*command, "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "would be pushed to https://huggingface.co/me/clip (private)" in listed
    assert "adapter_model.safetensors" in listed and "base/vocab.json" in listed
    assert main([*command, "--force"]) == 2
    assert capsys.readouterr().err == (
        "selora export: --push me/clip: there is no token: set HF_TOKEN, or run `hf auth login`\n"
    )
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    with hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)  # type: ignore[attr-defined]
        assert main([*command, "--force"]) == 0
        assert server.created[0]["visibility"] == "private"
        pushed = {name: data for commit in server.commits for name, data in commit.items()}
    assert pushed == {
        file.relative_to(out).as_posix(): file.read_bytes() for file in Path(out).rglob("*") if file.is_file()
    }
    with hub(refuse=True) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)  # type: ignore[attr-defined]
        capsys.readouterr()
        assert main([*command, "--force"]) == 2
    error = capsys.readouterr().err
    assert "the token is refused (403)" in error and error.count("\n") == 1
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main([*command, "--force"]) == 2
    assert "does not answer" in capsys.readouterr().err
    assert main(["export", run, out, "--to", "peft", "--push", "nonsense"]) == 2
    assert "should be ORG/NAME" in capsys.readouterr().err
