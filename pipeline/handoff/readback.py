"""Reading an export back with transformers and peft; only this module imports them, and only on request."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.handoff.source import Mismatch
from pipeline.model.export import BASE, CAPTIONS, logits_by_open_clip, logits_by_timm

Read = Callable[..., Tensor]  # (directory, tensors of `fixed_batch`) -> logits


@dataclass(frozen=True)
class Reader:
    """How a format is read back.

    Attributes:
        packages: distribution name -> module that it needs.
        read: logits of a directory; None if handoff.graphs compares more than logits.
        extra: extra of selora's distribution that installs the packages.
        shown: the packages that read, if others only write; empty: all.
    """

    packages: dict[str, str]
    read: Read | None
    extra: str = "export"
    shown: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        return [name for name, module in self.packages.items() if importlib.util.find_spec(module) is None]

    def check_installed(self, needed: bool = False) -> None:
        """Raise ConfigError unless the packages are installed. needed: they are also necessary for writing."""
        if self.missing:
            what = "written" if needed else "checked"
            or_else = "" if needed else ", or give --unverified to write it unchecked"
            raise ConfigError(
                f"the export cannot be {what} without {' and '.join(self.missing)}: install them with "
                f"`pip install 'selora[{self.extra}]'`{or_else}"
            )

    @property
    def name(self) -> str:
        return " + ".join(f"{name} {version(name)}" for name in self.shown or self.packages)


@torch.no_grad()
def _hf_logits(model: Any, images: Tensor, tokens: Tensor) -> Tensor:
    return model.eval()(input_ids=tokens, pixel_values=images).logits_per_image


def _read_hf(directory: Path, images: Tensor, tokens: Tensor) -> Tensor:
    with _quiet():
        return _hf_logits(_base(directory, tokens), images, tokens)


def _read_peft(directory: Path, images: Tensor, tokens: Tensor) -> Tensor:
    with _quiet():
        from peft import PeftModel

        model = PeftModel.from_pretrained(_base(directory / BASE, tokens), str(directory))
        return _hf_logits(model, images, tokens)


def _base(directory: Path, tokens: Tensor) -> Any:
    """The CLIPModel with all weights from the directory; its tokenizer must give the same tokens."""
    from transformers import CLIPModel, CLIPTokenizer

    tokenizer: Any = CLIPTokenizer.from_pretrained(str(directory), local_files_only=True)
    for caption, wanted in zip(CAPTIONS, tokens.tolist(), strict=True):
        found = tokenizer(caption, truncation=True)["input_ids"]
        if found != wanted[: len(found)]:  # each pads in its own way after the end of the text
            raise Mismatch(f"{directory}: CLIPTokenizer reads {caption!r} as {found}, open_clip as {wanted}")
    loaded: Any = CLIPModel.from_pretrained(str(directory), output_loading_info=True, local_files_only=True)
    model, report = loaded
    wrong = {name: sorted(report.get(name) or ()) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if found := [f"{name} {', '.join(map(str, keys[:5]))}" for name, keys in wrong.items() if keys]:
        raise Mismatch(f"{directory}: {'; '.join(found)}")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and messages, and restore the user's settings afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


_GRAPH_PACKAGES = ("onnx", "onnxruntime", "onnxscript", "tokenizers")
_GRAPHS = Reader({name: name for name in _GRAPH_PACKAGES}, None, "onnx", ("onnxruntime",))
READERS = {
    "open_clip": Reader({"open_clip_torch": "open_clip"}, logits_by_open_clip),
    "hf": Reader({"transformers": "transformers"}, _read_hf),
    "peft": Reader({"peft": "peft", "transformers": "transformers"}, _read_peft),
    "timm": Reader({"timm": "timm"}, logits_by_timm),
    "onnx": _GRAPHS,
    "triton": _GRAPHS,
}
