"""Names of trials: a directory name and a label for tables, both derived from the trial's options."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import Config

# Options that are already in the first part of a name.
_SAID = ("adapter.kind", "adapter.rank", "adapter.random_k", "gate.enabled", "gate.lam", "seed")
_LONGEST = 230  # characters of a name; file systems allow 255, and seeds and suffixes follow
_KINDS = {"full": "full", "none": "rest only", "lora": "LoRA", "dora": "DoRA"}


def name_of(
    config: Config, changes: Mapping[str, Any], varied: Sequence[str], *, seeds: bool, given: str | None
) -> str:
    """gated_lora_r16_lam0.3, followed by other options that vary and the seed; `given` replaces the first part."""
    adapter = config.adapter
    blocks = adapter.kind in ("lora", "dora")
    if given is None:
        parts = [f"gated_{adapter.kind}" if config.gated else adapter.kind]
        parts += [f"r{adapter.rank}"] if blocks else []
        parts += [f"random{adapter.random_k}"] if blocks and adapter.random_k is not None else []
        parts += [f"lam{value_text(config.gate.lam)}"] if config.gated else []
        parts += [_short(key, value) for key, value in changes.items() if key in varied and key not in _SAID]
    else:
        front = {"adapter.rank": f"r{adapter.rank}", "adapter.kind": adapter.kind}
        parts = [given, *(front.get(key, _short(key, changes[key])) for key in varied if key != "seed")]
    parts += [f"seed{config.seed}"] if seeds or "seed" in varied else []
    name = re.sub(r"[^A-Za-z0-9._+=,@-]", "-", "_".join(parts))
    if len(name) <= _LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: _LONGEST - len(digest) - 1]}-{digest}"


def label_of(
    config: Config, changes: Mapping[str, Any], varied: Sequence[str], *, seeds: bool, given: str | None
) -> str:
    """ "gated LoRA r16 λ0.3", for tables and figures."""
    adapter = config.adapter
    blocks = adapter.kind in ("lora", "dora")
    kind = _KINDS[adapter.kind]
    parts = [given or (f"gated {kind}" if config.gated else kind)]
    rank_said = given is not None and "adapter.rank" not in varied
    parts += [f"r{adapter.rank}"] if blocks and not rank_said else []
    parts += [f"{adapter.random_k} random blocks"] if blocks and adapter.random_k and given is None else []
    parts += [f"λ{value_text(config.gate.lam)}"] if config.gated and given is None else []
    parts += [f"{key}={value_text(changes[key])}" for key in varied if key not in _SAID]
    parts += [f"seed {config.seed}"] if seeds or "seed" in varied else []
    return " ".join(parts)


def value_text(value: Any) -> str:
    """A value for names and messages: 0.3, not 0.30000000000000004; lists joined."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "-".join(value_text(each) for each in value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _short(key: str, value: Any) -> str:
    last = key.rpartition(".")[2]
    return f"{last}{value_text(value)}" if isinstance(value, int | float) else value_text(value)
