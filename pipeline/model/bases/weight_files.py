"""Advice about weight files that torch cannot read without running the code in them."""

from __future__ import annotations

import zipfile
from pathlib import Path

# Attributes of a scripted CLIP that are not weights.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
_TORCHSCRIPT = "w = torch.jit.load({file!r}, map_location='cpu').state_dict()"
_PICKLED = (
    "w = torch.load({file!r}, map_location='cpu', weights_only=False); "
    "w = w.state_dict() if hasattr(w, 'state_dict') else w.get('state_dict', w)"
)
_SAVE = (
    "save_file({{k.removeprefix('module.'): v.clone().contiguous() for k, v in w.items() "
    "if k.split('.')[-1] not in {left_out}}}, "
    "{out!r})"
)


def advice(file: str | Path | None) -> str | None:
    """The command that turns a TorchScript or pickled file into safetensors; None for a file of another kind."""
    if file is None or Path(file).suffix == ".safetensors" or not Path(file).is_file():
        return None
    script = _is_torchscript(Path(file))
    what = "a TorchScript archive" if script else "pickled with more than tensors"
    out = str(Path(file).with_suffix(".safetensors"))
    line = (_TORCHSCRIPT if script else _PICKLED).format(file=str(file))
    save = _SAVE.format(left_out=_NO_WEIGHTS, out=out)
    return (
        f"{file} is {what}, and reading it would run the code in it. If you trust its source, turn it into "
        f'safetensors once:\npython -c "import torch; from safetensors.torch import save_file; {line}; {save}"\n'
        f"and set model.pretrained={out}"
    )


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.split("/")[1:] == ["constants.pkl"] for name in archive.namelist())
