"""A model repository of Triton Inference Server around exported graphs.

image/1/model.onnx   text/1/model.onnx   head/1/model.onnx    a config.pbtxt next to each
classify             an ensemble, pixels -> image -> head -> logits, with the class names as labels
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.model.onnx.run import OnnxModel
from pipeline.model.onnx.write import HEAD, IMAGE, TEXT

FILES = {name: f"{name}/1/model.onnx" for name in (IMAGE, TEXT, HEAD)}
ENSEMBLE, LABELS = "classify", "labels.txt"
MAX_BATCH = 64
_TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
}


def write_repository(directory: Path, graphs: OnnxModel, class_names: Sequence[str]) -> None:
    """Write config.pbtxt for each graph, and the ensemble if there is a head.

    Each class name is a line of labels.txt, so Triton returns names if a client requests classification.
    """
    for name, session in graphs.sessions.items():
        labelled = name == HEAD or (name == IMAGE and len(session.get_outputs()) > 1)  # a ViT's own classifier
        inputs = [_tensor("input", each) for each in session.get_inputs()]
        outputs = [_tensor("output", each, labelled and each.name == "logits") for each in session.get_outputs()]
        _write_config(directory / name, name, "onnxruntime_onnx", [*inputs, *outputs, "dynamic_batching { }"])
        if labelled:
            _write_labels(directory / name, class_names)
    if HEAD in graphs.sessions:
        _write_ensemble(directory / ENSEMBLE, graphs, class_names)


def _write_ensemble(directory: Path, graphs: OnnxModel, class_names: Sequence[str]) -> None:
    image, head = graphs.sessions[IMAGE], graphs.sessions[HEAD]
    steps = [_step(IMAGE, "pixels", "image_embeds"), _step(HEAD, "image_embeds", "logits")]
    scheduling = "ensemble_scheduling {\n  step [\n" + ",\n".join(steps) + "\n  ]\n}"
    parts = [_tensor("input", image.get_inputs()[0]), _tensor("output", head.get_outputs()[0], True), scheduling]
    _write_config(directory, ENSEMBLE, "ensemble", parts)
    _write_labels(directory, class_names)
    # Triton needs a version folder for every model, and archives drop empty folders
    (directory / "1").mkdir()
    (directory / "1" / ".keep").touch()


def _step(model: str, taken: str, given: str) -> str:
    return (
        f'    {{\n      model_name: "{model}"\n      model_version: -1\n'
        f'      input_map {{ key: "{taken}" value: "{taken}" }}\n'
        f'      output_map {{ key: "{given}" value: "{given}" }}\n    }}'
    )


def _tensor(kind: str, value: object, labelled: bool = False) -> str:
    """An entry of the config for an input or output of onnxruntime; the batch dimension is Triton's own."""
    name, shape, dtype = value.name, value.shape[1:], value.type  # pyright: ignore[reportAttributeAccessIssue]
    dims = ", ".join(str(side) if isinstance(side, int) else "-1" for side in shape)
    labels = f' label_filename: "{LABELS}"' if labelled else ""
    return f'{kind} [ {{ name: "{name}" data_type: {_TYPES[dtype]} dims: [ {dims} ]{labels} }} ]'


def _write_config(directory: Path, name: str, platform: str, parts: Iterable[str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    head = [f"name: {json.dumps(name)}", f"platform: {json.dumps(platform)}", f"max_batch_size: {MAX_BATCH}"]
    (directory / "config.pbtxt").write_text("\n".join([*head, *parts]) + "\n", encoding="utf-8")


def _write_labels(directory: Path, class_names: Sequence[str]) -> None:
    lines = [" ".join(name.split()) for name in class_names]
    (directory / LABELS).write_text("\n".join(lines) + "\n", encoding="utf-8")
