"""The model of the registry: saved, loaded and applied."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline.data.images import decode
from pipeline.model.clip import load_clip, save_open_clip
from pipeline.model.vit import load_vit, save_timm
from pipeline.tracking.served import served_model
from pipeline.tracking.served.served import CODE, Labels, example_image, load_served, predict, save_served

FORBIDDEN = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".lock", ".toml")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer a tower, with three classes of its own."""
    stage = tmp_path_factory.mktemp("stage")
    config = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    (stage / "start").mkdir()
    (stage / "start/open_clip_config.json").write_text(json.dumps(config))
    clip = load_clip(f"local-dir:{stage / 'start'}", seed=3)
    save_open_clip(clip.model, clip.model_cfg, clip.preprocess_cfg, stage / "clip")
    head = torch.nn.functional.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    return save_served(stage, stage / "clip", Labels(["cat", "dog", "owl"], ["a {c}."], head), {"selora.step": "5"})


@pytest.fixture(scope="module")
def saved_vit(tmp_path_factory: pytest.TempPathFactory, vit_dir: Callable[..., Path]) -> Path:
    """A ViT with a classifier of three classes."""
    stage = tmp_path_factory.mktemp("stage_vit")
    vit = load_vit(f"timm:local-dir:{vit_dir()}", classes=("cat", "dog", "owl"))
    return save_served(stage, save_timm(vit, stage / "vit"), None, {"selora.step": "5"})


@pytest.fixture(scope="module", params=["saved", "saved_vit"])
def each(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def model(saved: Path) -> Any:
    return load_served(saved)


def coded(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()


def test_it_names_images_given_as_bytes_base64_or_path(model: Any, tmp_path: Path) -> None:
    data = example_image()
    (tmp_path / "a.png").write_bytes(data)
    asked = ({"image": [data]}, {"image": [base64.b64encode(data).decode()]}, {"path": [str(tmp_path / "a.png")]})
    rows = [predict(model, columns)[0] for columns in asked]
    assert rows[0] == rows[1] == rows[2]
    assert sorted(rows[0]["labels"]) == ["cat", "dog", "owl"]
    assert rows[0]["label"] == rows[0]["labels"][0]
    assert rows[0]["scores"] == sorted(rows[0]["scores"], reverse=True)
    assert sum(rows[0]["scores"]) == pytest.approx(1, abs=1e-6)
    assert len(predict(model, {"image": [data]}, top_k=2)[0]["labels"]) == 2


def test_class_names_of_the_request_are_scored_by_their_texts(model: Any) -> None:
    data = example_image()
    names, templates = ["red car", "tree"], ["a {c}", "{c} at night"]
    (row,) = predict(model, {"image": [data]}, class_names=names, templates=templates)
    (image,) = (torch.tensor(one["embedding"]) for one in predict(model, {"image": [data]}, task="embed_images"))
    texts = [template.replace("{c}", name) for name in names for template in templates]
    vectors = torch.tensor([one["embedding"] for one in predict(model, {"text": texts}, task="embed_texts")])
    assert vectors.norm(dim=-1).allclose(torch.ones(4))
    heads = torch.nn.functional.normalize(vectors.view(2, 2, -1).mean(1), dim=-1)
    scale = model.unwrap_python_model().kind.model.logit_scale.exp().item()
    wanted = dict(zip(names, (scale * heads @ image).softmax(0).tolist(), strict=True))
    assert dict(zip(row["labels"], row["scores"], strict=True)) == pytest.approx(wanted, abs=1e-5)


def test_it_reads_images_as_the_evaluation_does() -> None:
    """It sees images upright and of any depth as the evaluation does."""
    image = Image.linear_gradient("L").resize((40, 20)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        coded(image, format="JPEG", exif=exif),
        coded(Image.fromarray(torch.arange(0, 65536, 64).view(32, 32).to(torch.uint16).numpy()), format="PNG"),
        coded(image.convert("RGBA"), format="PNG"),
        coded(image.convert("P"), format="GIF"),
    ]
    for file in files:
        expected: Any = decode(file, form="reference")
        assert served_model._rgb(0, served_model._decode, file).tobytes() == expected.tobytes()


def test_wrong_requests_say_what_is_wrong(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = example_image()
    cases = [
        ({"image": [data, data[:60]]}, {}, "row 1: no readable image"),
        ({"image": ["no base64!"]}, {}, "row 0: no readable image"),
        ({"text": ["a cat"]}, {}, "column image or path, got text"),
        ({"image": [data]}, {"task": "embed_texts"}, "needs a column text"),
        ({"image": [data]}, {"task": "sing"}, "expected one of classify, embed_images, embed_texts"),
        ({"image": [data]}, {"templates": ["a cat"]}, "has no {c}"),
        ({"image": [data]}, {"top_k": 0}, "top_k=0"),
    ]
    for columns, params, message in cases:
        with pytest.raises(ValueError, match=message):
            predict(model, columns, **params)
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    with pytest.raises(ValueError, match="a server reads no files"):
        predict(model, {"path": ["/etc/hostname"]})


def test_vectors_of_class_names_are_computed_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = load_served(saved), example_image()
    kind = model.unwrap_python_model().kind
    asked: list[int] = []
    real = kind.texts
    monkeypatch.setattr(kind, "texts", lambda texts: (asked.append(len(texts)), real(texts))[1])
    first = predict(model, {"image": [data] * 3}, class_names=["car", "tree"])
    again = predict(model, {"image": [data]}, class_names=["car", "tree"])
    assert again[0]["scores"] == pytest.approx(first[0]["scores"])
    predict(model, {"image": [data]}, class_names=["car", "boat", "tree"])
    predict(model, {"image": [data]})
    assert asked == [2, 3]
    monkeypatch.setitem(real.__func__.__globals__, "HEADS", 2)  # of the code that was saved
    for name in ("a", "b", "c"):
        predict(model, {"image": [data]}, class_names=[name])
    assert len(kind.heads) == 2


def test_a_server_refuses_what_is_too_much(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a server each is a 400 with the reason; in a process of one's own they are answered."""
    from mlflow.exceptions import MlflowException

    data = coded(Image.new("1", (9000, 9000)), format="PNG")
    many = {"class_names": ["car"] * 400, "templates": ["a {c}"] * 400}
    cases = [
        ({"image": [data]}, {}, "row 0: no readable image .*9000 x 9000 pixels"),
        ({"image": [b""] * 2000}, {}, "2000 rows, more than the 1024"),
        ({"image": [example_image()]}, many, "400 x 400 texts"),
    ]
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    for columns, params, message in cases:
        with pytest.raises(MlflowException, match=message) as refused:
            predict(model, columns, **params)
        assert refused.value.get_http_status_code() == 400
    monkeypatch.delenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT")
    assert predict(model, {"image": [data]})[0]["label"] in ("cat", "dog", "owl")


def test_a_vit_answers_of_its_own_classes_only(saved_vit: Path) -> None:
    model, data = load_served(saved_vit), example_image()
    (row,) = predict(model, {"image": [data]})
    assert sorted(row["labels"]) == ["cat", "dog", "owl"]
    assert sum(row["scores"]) == pytest.approx(1, abs=1e-6)
    (vector,) = predict(model, {"image": [data]}, task="embed_images")
    assert torch.tensor(vector["embedding"]).norm().item() == pytest.approx(1, abs=1e-6)
    cases = [
        ({"class_names": ["tree"]}, "class_names: this model knows the classes .* no others: cat, dog, owl"),
        ({"templates": ["a {c}"]}, "templates: this model knows the classes"),
        ({"task": "embed_texts"}, "this model reads no texts"),
    ]
    for params, message in cases:
        with pytest.raises(ValueError, match=message):
            predict(model, {"image": [data]}, **params)
    assert "text" not in model.metadata.get_input_schema().input_names()


def test_the_model_has_no_pickle_and_no_local_path(each: Path) -> None:
    """The model has no pickle no path of this machine and short requirements."""
    files = [file for file in each.rglob("*") if file.is_file()]
    assert not [file for file in files if file.suffix in FORBIDDEN]
    assert str(each.parent) not in (each / "MLmodel").read_text()
    assert str(Path.home()) not in (each / "MLmodel").read_text()
    names = [line.partition("==")[0] for line in (each / "requirements.txt").read_text().splitlines()]
    reader = "open_clip_torch" if (each / "artifacts/clip").is_dir() else "timm"
    assert sorted(names) == sorted(["mlflow", reader, "pandas", "pillow", "safetensors", "torch", "torchvision"])
    assert "+" not in (each / "requirements.txt").read_text()


def test_its_code_stands_alone() -> None:
    imported = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0]
        for node in ast.walk(ast.parse(CODE.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert "pipeline" not in imported
    assert imported - sys.stdlib_module_names == {
        "PIL", "mlflow", "numpy", "open_clip", "pandas", "safetensors", "timm", "torch",
    }  # fmt: skip


FRESH = """
import builtins, socket, sys
real = builtins.__import__
def guarded(name, *rest, **options):
    if name.split(".")[0] in ("pipeline", "deepspeed", "ray", "webdataset"):
        raise ImportError(f"{name} is not there")
    return real(name, *rest, **options)
builtins.__import__ = guarded
def no_network(*_):
    raise OSError("no network")
socket.socket.connect = no_network
import mlflow, pandas
table = pandas.DataFrame({"image": [open(sys.argv[1], "rb").read()]})
for model in sys.argv[2:]:
    print("label", mlflow.pyfunc.load_model(model).predict(table)["label"][0])
"""


def test_a_fresh_process_loads_it_without_this_package(saved: Path, saved_vit: Path, tmp_path: Path) -> None:
    """It also needs no network and no pickle."""
    (tmp_path / "a.png").write_bytes(example_image())
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "a.png"), str(saved), str(saved_vit)],
        cwd=tmp_path,
        env=os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [predict(load_served(each), {"image": [example_image()]})[0]["label"] for each in (saved, saved_vit)]
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("label ")] == expected


def test_what_pack_leaves_out_is_refused_and_limits_are_the_same() -> None:
    from pipeline.data.image_files import MAX_PIXELS, MAX_RATIO, BadImageError

    assert (served_model.MAX_PIXELS, served_model.MAX_RATIO) == (MAX_PIXELS, MAX_RATIO)
    floats, line = io.BytesIO(), io.BytesIO()
    Image.new("F", (9, 9)).save(floats, "TIFF")
    Image.new("RGB", (4010, 10)).save(line, "PNG")
    for data, message in ((floats.getvalue(), "floating point pixels"), (line.getvalue(), "4010 x 10 pixels")):
        with pytest.raises(BadImageError, match=message):
            decode(data)
        with pytest.raises(ValueError, match=f"row 3: no readable image .*{message}"):
            served_model._rgb(3, served_model._decode, data)


def test_texts_of_megabytes_are_refused_by_a_server(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    long = "x" * 2_000_000
    with pytest.raises(ValueError, match="a text of 2000003 characters, more than 10000: 'a x"):
        predict(model, {"image": [example_image()]}, class_names=[long, "y"], templates=["a {c}."])
    with pytest.raises(ValueError, match="a text of 2000000 characters, more than 10000: 'x"):
        predict(model, {"text": [long]}, task="embed_texts")
