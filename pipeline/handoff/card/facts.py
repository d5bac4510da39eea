"""What a model card says, gathered from a run: results of exactly these weights, the curve over strengths, licences."""

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

# What the authors of pretrained weights published them under: a part of the tag or of the hub's name -> SPDX, where the
# hub knows it. The first that fits.
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
    """Everything that a card is made of.

    Attributes:
        title: name of the run or of the registered model.
        source: the model.
        to: where it went: a format of `selora export`, or "mlflow".
        results: the summary of an evaluation of exactly these weights; None: there is none.
        curve: results between the untouched and the fine-tuned model; None: not evaluated.
        checked: how the export compares with the run's model, a sentence each.
        loss: of weights in 8 bits; empty for all other exports.
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
        """Whether it answers by a classifier of its own."""
        return isinstance(self.source.model, Vit)

    @property
    def base_entry(self) -> str | None:
        """ORG/NAME of the base at the Hugging Face hub; None where it comes from elsewhere."""
        state = self.source.found.state["model"]
        return hub_entry(state["name"], state["pretrained"])

    @property
    def base_licence(self) -> str | None:
        """The licence of the base's weights, as far as known."""
        state = self.source.found.state["model"]
        named = f"{state['pretrained'] or ''} {state['name']}".lower()
        if "local-dir:" in named or "/" in (state["pretrained"] or ""):
            return None  # a path says nothing about who wrote the weights
        return next((licence for part, licence in LICENCES.items() if part in named), None)


def _results(source: TrainedModel) -> dict[str, Any] | None:
    """The summary whose digest is that of the weights: of the run, or of one of its strengths."""
    folder = source.run_dir / EVAL
    files = [folder / SUMMARY_FILE, *sorted((folder / "strength").glob(f"*/{SUMMARY_FILE}"), reverse=True)]
    summaries = [_read(file) for file in files if file.is_file()]
    found = [each for each in summaries if each.get("model_digest") == source.weights_digest]
    # of several the one that says which floor was kept
    return max(found, key=lambda each: "floor" in (each.get("strength") or {}), default=None)


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_summary(file)
    except ConfigError:
        return {}  # `selora report` names a damaged file


def _curve(source: TrainedModel) -> dict[str, Any] | None:
    file = source.run_dir / EVAL / STRENGTH_FILE
    if not file.is_file():
        return None
    try:
        curve = read_json(file)
    except ConfigError:
        return None
    return curve if isinstance(curve, dict) and curve.get("model") == source.found.label else None
