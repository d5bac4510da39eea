"""The facts of a model card, from a run: results of exactly these weights, the curve over strengths, licences."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.config.text_file import read_json
from pipeline.handoff.source import TrainedModel
from pipeline.model.clip import hub_entry
from pipeline.model.vit import Vit
from pipeline.runs.results import EVAL, STRENGTH_FILE, SUMMARY_FILE, read_summary

# Licences of pretrained weights: a part of the tag or of the hub's name -> the SPDX identifier on the hub. The first
# match counts.
LICENCES = {
    "metaclip": "cc-by-nc-4.0",
    "dfn": "apple-amlr",
    "mobileclip": "apple-amlr",
    "dinov3": "other",
    "dinov2": "apache-2.0",
    "dino": "apache-2.0",
    "siglip": "apache-2.0",
    "webli": "apache-2.0",
    "openai": "mit",
    "laion": "mit",
    "datacomp": "mit",
    "commonpool": "mit",
    "eva": "mit",
}


@dataclass(frozen=True)
class CardFacts:
    """The content of a card.

    Attributes:
        title: name of the run or of the registered model.
        source: the model.
        to: its destination: a format of `selora export`, or "mlflow".
        results: the summary of an evaluation of exactly these weights, if there is one.
        curve: results between the untouched and the fine-tuned model; None: not evaluated.
        checked: comparisons of the export with the run's model, a sentence each.
        loss: loss by weights in 8 bits; empty for all other exports.
    """

    title: str
    source: TrainedModel
    to: str
    results: dict[str, Any] | None = None
    curve: dict[str, Any] | None = None
    checked: list[str] = field(default_factory=list)
    loss: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def of(
        source: TrainedModel, to: str, title: str, checked: list[str], loss: list[dict[str, Any]] | None = None
    ) -> CardFacts:
        """The facts of a run's model."""
        return CardFacts(title, source, to, _results(source), _curve(source), checked, loss or [])

    @property
    def is_vit(self) -> bool:
        """Whether it has its own classifier."""
        return isinstance(self.source.model, Vit)

    @property
    def base_entry(self) -> str | None:
        """ORG/NAME of the base on the Hugging Face hub; None if it comes from elsewhere."""
        state = self.source.found.state["model"]
        return hub_entry(state["name"], state["pretrained"])

    @property
    def base_licence(self) -> str | None:
        """The licence of the base's weights, if known."""
        state = self.source.found.state["model"]
        named = f"{state['pretrained'] or ''} {state['name']}".lower()
        if "local-dir:" in named or "/" in (state["pretrained"] or ""):
            return None  # a path does not tell the author of the weights
        return next((licence for part, licence in LICENCES.items() if part in named), None)


def _results(source: TrainedModel) -> dict[str, Any] | None:
    """The summary with the digest of the weights, for the run or for one of its strengths."""
    folder = source.run_dir / EVAL
    files = [folder / SUMMARY_FILE, *sorted((folder / "strength").glob(f"*/{SUMMARY_FILE}"), reverse=True)]
    summaries = [_read(file) for file in files if file.is_file()]
    found = [each for each in summaries if each.get("model_digest") == source.weights_digest]
    # of several, the one with the floor that was kept
    return max(found, key=lambda each: "floor" in (each.get("strength") or {}), default=None)


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_summary(file)
    except ConfigError:
        return {}  # `selora report` reports a damaged file


def _curve(source: TrainedModel) -> dict[str, Any] | None:
    file = source.run_dir / EVAL / STRENGTH_FILE
    if not file.is_file():
        return None
    try:
        curve = read_json(file)
    except ConfigError:
        return None
    return curve if isinstance(curve, dict) and curve.get("model") == source.found.label else None
