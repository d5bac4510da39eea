"""A run's merged checkpoint for exports and the registry, with the digests of its origin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from pipeline.config import ConfigError
from pipeline.model.between import load_at
from pipeline.model.clip import Clip
from pipeline.model.load import Model, as_clip
from pipeline.model.restore import RunSource, find_run
from pipeline.model.vit import SCHEMA
from pipeline.model.weights import stock_state, weights_digest
from pipeline.tracking.identity import read_identity
from pipeline.tracking.journal import JOURNAL, Record, read


class Mismatch(Exception):
    """The exported model differs from the run's model: a fault of selora, not of its user."""


@dataclass(frozen=True)
class TrainedModel:
    """One checkpoint of one run.

    Attributes:
        model: the merged model in fp32, at `strength` between the untouched model (0) and the fine-tuned one (1).
    """

    run_dir: Path
    found: RunSource
    model: Model
    weights_digest: str
    strength: float = 1.0

    @property
    def clip(self) -> Clip:
        """The model; ConfigError for a ViT."""
        return as_clip(self.model, str(self.run_dir))

    @property
    def gate_map(self) -> dict[str, dict[str, Any]]:
        return self.found.state["gate_map"] or {}

    @property
    def active(self) -> list[str]:
        """Targets whose blocks act."""
        return [target for target, gate in self.gate_map.items() if gate["open"]]

    def facts(self) -> dict[str, str]:
        """The origin of the weights as texts, the same in exports and in version tags; unknown facts are left out."""
        state = self.found.state
        identity = read_identity(self.run_dir)
        facts = {
            "weights_digest": self.weights_digest,
            "base_digest": self.found.base_digest,
            "adapter_digest": adapter_digest(self.found),
            "data_digest": state["data_digest"],
            "base_model": base_name(state["model"]),
            "checkpoint": self.found.label,
            "step": str(self.found.step),
            "adapter": f"{state['adapter']['kind']} rank {state['adapter']['rank']}",
            "train_rest": self.found.train_rest,
            "strength": None if self.strength == 1 else f"{self.strength:g}",
            "git_commit": trained_by(self.run_dir),
            "run": None if identity is None else identity.run,
        }
        if self.gate_map:
            facts |= {
                "active_blocks": f"{len(self.active)}/{len(self.gate_map)}",
                "gate_map": short_gate_map(self.active),
            }
        return {name: value for name, value in facts.items() if value is not None}


def read_source(run_dir: str | Path, step: int | None = None, strength: float = 1.0) -> TrainedModel:
    """Load and merge the newest (or the chosen) checkpoint, at a strength; a damaged one is a ConfigError."""
    found = find_run(run_dir, step)
    model = load_at(run_dir, strength, found.step)
    return TrainedModel(Path(run_dir), found, model, weights_digest(stock_state(model.model)), strength)


def adapter_digest(found: RunSource) -> str:
    """sha256 over all trained parameters: blocks, scores and others."""
    file = found.checkpoint / "trainable.safetensors"
    try:
        return weights_digest(load_file(file))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error


def base_name(model: dict[str, Any]) -> str:
    """A recognisable name of the base; for a directory only its last part, because paths differ by machine."""
    name, pretrained = model["name"], model["pretrained"]
    scheme = SCHEMA if name.startswith(SCHEMA) else ""
    plain = name.removeprefix(scheme)
    shown = scheme + (f"local-dir:{Path(plain).name}" if plain.startswith("local-dir:") else plain)
    if not pretrained:
        return shown
    return f"{shown} {Path(pretrained).name if '/' in pretrained else pretrained}"


def short_gate_map(active: list[str]) -> str:
    """The open blocks in a line, as in `image.0: q k fc1; image.3: out`; `none` if all are closed."""
    layers: dict[str, list[str]] = {}
    for target in active:
        layer, _, projection = target.rpartition(".")
        layers.setdefault(layer, []).append(projection.removesuffix("_proj"))
    return "; ".join(f"{layer}: {' '.join(names)}" for layer, names in layers.items()) or "none"


def trained_by(run_dir: Path) -> str | None:
    """The git commit of the code that trained the run, from its journal; None without git."""
    journal = run_dir / JOURNAL
    commit = None
    for record in read(journal) if journal.is_file() else ():
        if isinstance(record, Record) and record.kind == "tags":
            commit = record.data["values"].get("git.commit", commit)
    return commit
