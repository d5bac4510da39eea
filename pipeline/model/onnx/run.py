"""Exported graphs with the interface of a CLIP, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.model.onnx.write import HEAD, IMAGE, TEXT


class OnnxModel:
    """`encode_image` and `encode_text` of exported graphs, and the logits of their head.

    Like a CLIP, it takes pixels that are normalized by `mean` and `std`; if the graph normalizes them itself, they are
    first converted back to bytes.
    """

    def __init__(self, files: Mapping[str, Path], mean: Sequence[float], std: Sequence[float]) -> None:
        self.sessions = {name: _session(file) for name, file in files.items() if file.is_file()}
        self.mean, self.std = (torch.tensor(each).view(1, -1, 1, 1) for each in (mean, std))
        (pixels,) = self.sessions[IMAGE].get_inputs()
        self.takes_bytes = pixels.type == "tensor(uint8)"
        text = self.sessions.get(TEXT)
        # int, or a name if the length is free
        self.context = None if text is None else text.get_inputs()[0].shape[1]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) normalized pixels -> (N, D) unit vectors."""
        return self._run(IMAGE, self._pixels(pixels), "image_embeds")

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """(N, L) tokens -> (N, D) unit vectors."""
        missing = self.context - input_ids.shape[1] if isinstance(self.context, int) else 0
        return self._run(TEXT, torch.nn.functional.pad(input_ids.cpu(), (0, missing)), "text_embeds")

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) normalized pixels -> (N, K) logits of the head, or of a ViT's classifier."""
        if HEAD in self.sessions:
            return self._run(HEAD, self.encode_image(pixels), "logits")
        return self._run(IMAGE, self._pixels(pixels), "logits")

    def _pixels(self, pixels: Tensor) -> Tensor:
        pixels = pixels.cpu()
        if not self.takes_bytes:
            return pixels
        return ((pixels * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def _run(self, name: str, value: Tensor, output: str) -> Tensor:
        session = self.sessions[name]
        (found,) = session.run([output], {session.get_inputs()[0].name: value.contiguous().numpy()})
        return torch.from_numpy(found)


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings are about the optimizer's own choices
    return onnxruntime.InferenceSession(str(file), options, providers=onnxruntime.get_available_providers())
