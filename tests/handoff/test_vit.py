"""A ViT with its classifier: exported to timm, registered, and compared with its run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from pipeline.cli import main
from pipeline.config import ConfigError, Promote
from pipeline.handoff import served_run
from pipeline.handoff.export import export
from pipeline.handoff.predict import predict_files
from pipeline.handoff.promote import promote
from pipeline.handoff.source import Mismatch
from pipeline.model.restore import load_run
from pipeline.model.vit import Vit
from pipeline.tracking.mlflow.registry import Registry, load_registered
from pipeline.tracking.served.served import predict

CLASSES = ("class_0", "class_1", "class_2")


@pytest.fixture(scope="module")
def run(
    make_vit_run: Callable[..., Path], evaluated: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run whose gates are open, with results of its own classes."""
    return evaluated(make_vit_run(tmp_path_factory.mktemp("vits") / "run", CLASSES, steps=(5,)))


@pytest.fixture(scope="module")
def wide(photo: bytes) -> bytes:
    """A photo of twice its width: a crop would not see what the squashing resize sees."""
    out = io.BytesIO()
    image = Image.open(io.BytesIO(photo))
    image.resize((2 * image.width, image.height)).save(out, "PNG")
    return out.getvalue()


def test_timm_reads_the_run_from_its_export(run: Path, tmp_path: Path) -> None:
    report = export(run, "timm", tmp_path / "out")
    assert str(report).startswith(f"{tmp_path / 'out'}: timm export, read back by timm {timm.__version__}: logits")
    stock: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    own: Any = load_run(run).model
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(stock(images), own(images), atol=1e-5, rtol=1e-5)
    facts = json.loads((tmp_path / "out/selora.json").read_text())
    assert facts["active_blocks"] == "12/12"
    assert facts["base_model"].startswith("timm:local-dir:vit"), "its last name only"
    assert facts["largest_difference"] < 1e-4
    assert json.loads((tmp_path / "out/config.json").read_text())["label_names"] == list(CLASSES)
    with pytest.raises(ConfigError, match="--force"):
        export(run, "timm", tmp_path / "out")


def test_a_format_of_the_other_kind_is_refused(run: Path, make_run: Callable[..., Path], tmp_path: Path) -> None:
    """A format of the other kind is refused with those that fit."""
    for to in ("open_clip", "hf", "peft"):
        with pytest.raises(ConfigError, match=rf"to={to}: timm:local-dir.* is a ViT, which is exported to timm"):
            export(run, to, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"to=timm: .* is a CLIP, which is exported to open_clip or hf or peft"):
        export(make_run(), "timm", tmp_path / "out")
    with pytest.raises(ConfigError, match="holds merged weights only$"):
        export(run, "timm", tmp_path / "out", merged=False)
    assert not list(tmp_path.iterdir())


def test_the_champion_answers_what_the_run_computes(
    run: Path, store: str, wide: bytes, tmp_path: Path, pixels_of: Callable[..., Any]
) -> None:
    done = promote(run, "vits", Promote(min_gain=-1.0, min_dataset=("others >= 0",)), champion=True, uri=store)
    assert (done.version, done.aliases) == ("1", ("champion",))
    assert "holds  promote.min_gain" in str(done)
    assert Registry(store, "vits").tags("1")["selora.active_blocks"] == "12/12"
    assert promote(run, "vits", Promote(), uri=store).new is False

    vit = load_run(run)
    assert isinstance(vit, Vit)
    pixels = pixels_of(wide, vit)
    with torch.no_grad():
        scores = vit.model(pixels).softmax(dim=-1)[0].tolist()
        features = torch.nn.functional.normalize(vit.model.encode_image(pixels), dim=-1)
    (tmp_path / "wide.png").write_bytes(wide)
    (row,) = predict_files("models:/vits@champion", [tmp_path / "wide.png"], uri=store)
    assert row["label"] == CLASSES[scores.index(max(scores))]
    found = dict(zip(row["labels"], row["scores"], strict=True))
    assert found == pytest.approx(dict(zip(CLASSES, scores, strict=True)), abs=1e-5)
    model = load_registered("models:/vits@champion", store)
    (row,) = predict(model, {"image": [wide]}, task="embed_images")
    torch.testing.assert_close(torch.tensor([row["embedding"]]), features, atol=1e-5, rtol=0)


def test_classes_of_the_caller_are_refused(
    run: Path, store: str, wide: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"classnames: timm:.* predicts only the classes that it was trained on"):
        promote(run, "own", class_names=["a cat"], uri=store)
    with pytest.raises(ConfigError, match="templates: timm:"):
        promote(run, "own", templates="simple", uri=store)
    promote(run, "own", uri=store)
    (tmp_path / "wide.png").write_bytes(wide)
    arguments = ["predict", "models:/own/1", str(tmp_path / "wide.png"), "--uri", store]
    assert main([*arguments, "--classes", "a cat"]) == 2
    assert "models:/own/1: class_names: this model knows the classes" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "class_" in capsys.readouterr().out


def test_a_served_model_that_sees_otherwise_is_not_registered(
    run: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cropped(vit: Vit, directory: Path) -> Path:
        config = save(vit, directory) / "config.json"
        config.write_text(config.read_text().replace('"squash"', '"center"'))
        return directory

    save = served_run.save_timm
    monkeypatch.setattr(served_run, "save_timm", cropped)
    with pytest.raises(Mismatch, match="differs from the run's by"):
        promote(run, "cropped", uri=store)
    assert Registry(store, "cropped").alias("challenger") is None
