"""The towers of a merged model and its zero-shot head as ONNX graphs with a free batch dimension.

    image   pixels (N, 3, H, W)        -> image_embeds (N, D) unit vectors; for a ViT also logits (N, K)
    text    input_ids (N, context)     -> text_embeds (N, D) unit vectors
    head    image_embeds (N, D)        -> logits (N, K) for the class names that the export was given

pixels are uint8 from 0 to 255, and the graph normalizes them, or float32 that the caller has normalized. Vectors and
logits are float32 in every precision.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pipeline.model.load import Model
from pipeline.model.vit import Vit

Precision = Literal["fp32", "fp16", "int8"]
Pixels = Literal["uint8", "normalized"]

IMAGE, TEXT, HEAD = "image", "text", "head"
# Read by onnxruntime >= 1.14 and TensorRT >= 8.6.
OPSET = 18
# A protobuf holds less than 2 GiB; from this size on the weights go into a file next to the graph.
_OWN_FILE = 1_800_000_000


class ImageTower(nn.Module):
    """Pixels -> unit vectors, and the logits of a ViT's classifier."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Model, dtype: torch.dtype, pixels: Pixels) -> None:
        super().__init__()
        self.model: Any = copy.deepcopy(model.model).to(dtype)
        self.vit, self.dtype, self.pixels = isinstance(model, Vit), dtype, pixels
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(model.preprocess_cfg[name], dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.pixels == "uint8":
            pixels = (pixels.to(torch.float32) / 255 - self.mean) / self.std
        features = self.model.encode_image(pixels.to(self.dtype))
        vectors = normalize(features.float(), dim=-1)
        return (vectors, self.model.head(features).float()) if self.vit else vectors


class TextTower(nn.Module):
    """Tokens -> unit vectors."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        super().__init__()
        self.model: Any = copy.deepcopy(model.model).to(dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        return normalize(self.model.encode_text(input_ids).float(), dim=-1)


class Head(nn.Module):
    """Unit vectors -> logits: cosines with the K class vectors times the model's scale, plus its bias if it has one."""

    weight: Tensor
    bias: Tensor

    def __init__(self, model: Any, classes: Tensor) -> None:
        super().__init__()
        bias = getattr(model, "logit_bias", None)
        self.register_buffer("weight", (model.logit_scale.detach().exp() * classes.cpu()).T.contiguous())
        self.register_buffer("bias", torch.zeros(1) if bias is None else bias.detach().reshape(1))

    def forward(self, image_embeds: Tensor) -> Tensor:
        return image_embeds @ self.weight + self.bias


def write_graphs(
    model: Model, files: Mapping[str, Path], *, precision: Precision, pixels: Pixels, classes: Tensor | None
) -> None:
    """Write the graphs of a model.

    Args:
        model: merged, on the CPU.
        files: paths of "image", "text" and "head"; text and head are not written for a ViT, nor the head without
            classes.
        precision: of weights and activations; int8: fp32, with weights that `quantize` stores in 8 bits.
        pixels: input of the image graph.
        classes: (K, D) unit vectors of the class names.
    """
    dtype = torch.float16 if precision == "fp16" else torch.float32
    height, width = _sides(model.preprocess_cfg["size"])
    kind = torch.uint8 if pixels == "uint8" else torch.float32
    outputs = ["image_embeds", *(["logits"] if isinstance(model, Vit) else [])]
    image = ImageTower(model, dtype, pixels)
    _write(image, torch.zeros(2, 3, height, width, dtype=kind), files[IMAGE], "pixels", outputs, precision)
    if isinstance(model, Vit):
        return
    tokens = model.tokenizer(["a photo", "two photos"])
    _write(TextTower(model, dtype), tokens, files[TEXT], "input_ids", ["text_embeds"], precision)
    if classes is not None and len(classes):
        head = Head(model.model, classes)
        _write(head, torch.zeros(2, classes.shape[1]), files[HEAD], "image_embeds", ["logits"], "fp32")


def _write(module: nn.Module, example: Tensor, file: Path, inputs: str, outputs: list[str], precision: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    large = sum(p.numel() * p.element_size() for p in module.parameters()) > _OWN_FILE
    written = file.with_name(f"fp32-{file.name}") if precision == "int8" else file
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module.eval().requires_grad_(False),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[inputs],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
        assert program is not None  # None only from the older exporter
        program.save(str(written), external_data=large)
    if precision == "int8":
        quantize(written, file, large)
        for each in (written, written.with_name(f"{written.name}.data")):
            each.unlink(missing_ok=True)


def quantize(graph: Path, file: Path, large: bool) -> None:
    """Copy a graph with the weights of its matrix products in 8 bits and a scale for each output.

    Activations are quantized while the graph runs, by the range of each batch ("dynamic" quantization).

    Args:
        graph: the fp32 graph.
        file: path of the new graph.
        large: whether its weights go into a file next to it.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            graph,
            file,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=large,
            # attention multiplies activations by activations, which have no scale for each output
            extra_options={"MatMulConstBOnly": True},
        )


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress messages of torch and onnxruntime."""
    loggers = [logging.getLogger(name) for name in ("", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
