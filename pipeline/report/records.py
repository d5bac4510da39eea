"""Records of runs for the report, whether read from a directory, a sweep or an MLflow experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import yaml

from pipeline.config import Promote, is_vit
from pipeline.evaluation.summary import Summary
from pipeline.selection.candidates import Candidate, Taken, take
from pipeline.selection.frontier import AtStrength, curve_of
from pipeline.selection.ranking import Point, pareto_front, point_of
from pipeline.selection.rule import holds

# "trained": the schedule is complete, and there is no evaluation yet.
Status = Literal["waiting", "training", "evaluating", "trained", "finished", "failed", "stopped"]
RUNNING: tuple[Status, ...] = ("waiting", "training", "evaluating")
Flat = Mapping[str, Any]
Series = list[tuple[int, float]]  # step, value; steps rise


@dataclass(frozen=True)
class RunSettings:
    """The settings that distinguish runs in tables and figures. `rank` is None without blocks, `lam` without gates."""

    kind: str
    rank: int | None
    gated: bool
    lam: float | None
    penalty: str | None
    random_k: int | None
    seed: int
    model: str
    pretrained: str | None
    classifies: bool  # a ViT with a classifier, not a CLIP
    train_rest: str
    keeps: bool = False  # held near the untouched model on reference data
    soup: bool = False  # the mean of several seeds, not a training
    image_size: int | None = None  # if it differs from the model's own

    @staticmethod
    def of(flat: Flat) -> RunSettings:
        """Settings from a flat config; a missing key counts as None, as in MLflow."""
        kind, random_k = str(flat["adapter.kind"]), flat.get("adapter.random_k")
        has_blocks = kind in ("lora", "dora")
        gated = has_blocks and random_k is None and bool(flat["gate.enabled"])
        return RunSettings(
            kind,
            int(flat["adapter.rank"]) if has_blocks else None,
            gated,
            float(flat["gate.lam"]) if gated else None,
            str(flat["gate.penalty"]) if gated else None,
            None if random_k is None else int(random_k),
            int(flat["seed"]),
            str(flat["model.name"]),
            flat.get("model.pretrained"),
            is_vit(str(flat["model.name"])),
            str(flat.get("train.train_rest")),
            bool(flat.get("keep.weight")),
            bool(flat.get("soup")),
            None if flat.get("model.image_size") is None else int(flat["model.image_size"]),
        )

    @property
    def is_linear(self) -> bool:
        """Whether only a ViT's classifier trains."""
        return self.classifies and self.kind == "none" and self.train_rest == "none"

    @property
    def method(self) -> str:
        """ "gated LoRA", "DoRA + keep", "soup of full fine-tuning", .."""
        return ("soup of " if self.soup else "") + self._trained + (" + keep" if self.keeps else "")

    @property
    def _trained(self) -> str:
        if self.kind == "full":
            return "full fine-tuning"
        if self.kind == "none":
            return "linear classifier" if self.is_linear else "no blocks"
        adapter = {"lora": "LoRA", "dora": "DoRA"}[self.kind]
        if self.random_k is not None:
            return f"{self.random_k} random {adapter} blocks"
        return f"gated {adapter}" if self.gated else adapter


def scalar(text: str) -> Any:
    """A value from MLflow, which stores texts, as number, bool, None or text."""
    if text in ("None", ""):
        return None
    value = yaml.safe_load(text) if len(text) < 40 and not text.startswith(("[", "{")) else text
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-05 as text
        except ValueError:
            return value
    return value if isinstance(value, (bool, int, float)) else text


@dataclass(frozen=True)
class Best:
    """The checkpoint with the highest id mean, of a run whose checkpoints were compared."""

    step: int
    id: float
    last_step: int
    last_id: float
    active_share: float | None
    summary: Summary


@dataclass(frozen=True)
class Run:
    """One training and its results. `error` says in a line why a run failed."""

    name: str
    label: str
    config: Flat
    status: Status
    baseline: bool = False
    error: str | None = None
    step: int = 0
    total_steps: int | None = None
    summary: Summary | None = None
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # dataset -> metric -> value
    untouched: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # the same for the model it started from
    gates: Mapping[str, bool] = field(default_factory=dict)  # target -> open; every block of an ungated adapter is
    history: Mapping[str, Series] = field(default_factory=dict)
    strength: Mapping[str, Any] | None = None
    best: Best | None = None
    configuration: str | None = None  # the same for the seeds of one configuration of a sweep; None: the run alone
    floors: Mapping[float, AtStrength] = field(default_factory=dict)  # share kept -> the model at its strength
    at_floor: Summary | None = None  # at the strength that keeps the floor of the sweep
    cost: int | None = None  # number of trained parameters that act
    budget: Mapping[str, Any] | None = None  # usefulness of each block, and when it was dropped

    @cached_property
    def settings(self) -> RunSettings:
        return RunSettings.of(self.config)

    @cached_property
    def point(self) -> Point | None:
        return None if self.summary is None else point_of(self.summary)

    @cached_property
    def curve(self) -> list[AtStrength]:
        """The points of its strength curve by rising α; empty if none was measured."""
        return curve_of(self.strength, self.summary["datasets"]) if self.strength and self.summary else []

    @property
    def best_alone(self) -> bool:
        """Whether the run is represented by its best checkpoint, because its last one was not evaluated."""
        return self.best is not None and self.summary is self.best.summary

    @cached_property
    def target(self) -> str | None:
        """The dataset that a ViT's classifier was trained for; None before its first result, and for a CLIP."""
        if self.summary is None or not self.settings.classifies:
            return None
        return " + ".join(key for key, each in self.summary["datasets"].items() if each["group"] == "id") or None

    def candidate(self, floor: float | None) -> Candidate | None:
        """The run as a model to choose, at the floor of its sweep; None without results there."""
        at = self.floors.get(floor) if floor is not None else None
        if self.summary is None or (floor is not None and at is None):
            return None
        summary = self.at_floor if at is not None and self.at_floor is not None else self.summary
        if (point := point_of(summary)) is None:
            return None
        allowed = holds(self.rule, summary) and (at is None or at.alpha > 0)
        return Candidate(self.name, self.configuration or self.name, point, allowed, at, self.cost)

    @property
    def rule(self) -> Promote:
        """The promotion rule in its config."""
        given = {
            key.removeprefix("promote."): value for key, value in self.config.items() if key.startswith("promote.")
        }
        return Promote(**{key: yaml.safe_load(v) if isinstance(v, str) else v for key, v in given.items()})

    @property
    def active_share(self) -> float | None:
        """Share of open blocks in [0, 1]; None without blocks, or before the first record of them."""
        return sum(self.gates.values()) / len(self.gates) if self.gates else None

    def group(self, name: str) -> float | None:
        """Mean of a group in [0, 1]; None unless every dataset of it is evaluated."""
        found = None if self.summary is None else self.summary["groups"].get(name)
        return None if found is None or found["missing"] else found["mean"]


@dataclass(frozen=True)
class Collection:
    """All runs of one report. `source` says where they were read.

    `attended`: whether a process is working on unfinished runs; None if that cannot be determined.
    `floor`: share kept at which the runs of a sweep are compared.
    """

    title: str
    source: str
    runs: Sequence[Run]
    attended: bool | None = None
    floor: float | None = None

    @cached_property
    def classifies(self) -> bool:
        """Whether all runs are ViTs with a classifier."""
        return all(run.settings.classifies for run in self.runs)

    @cached_property
    def sites(self) -> int | None:
        """Number of blocks that a model can carry; None if no run has blocks on all targets."""
        return max((len(run.gates) for run in self.runs if run.settings.random_k is None), default=0) or None

    def active_share(self, run: Run) -> float | None:
        """Share of open blocks among all that the model can carry, also for a run with a few random blocks."""
        if run.settings.random_k is None:
            return run.active_share
        return sum(run.gates.values()) / self.sites if self.sites and run.gates else None

    @cached_property
    def parts(self) -> Sequence[Collection]:
        """The runs by the target set of their classifiers, whose accuracies are not comparable; for CLIPs, all runs.

        A run without results is grouped with those that train on the same data.
        """
        data = {str(run.config.get("data.train")): run.target for run in self.runs if run.target is not None}
        members: dict[str | None, list[Run]] = {}
        for run in self.runs:
            known = run.target or (data.get(str(run.config.get("data.train"))) if run.summary is None else None)
            members.setdefault(known, []).append(run)
        if len([target for target in members if target is not None]) < 2:
            return [self]
        return [
            Collection(target or "the others", self.source, runs, floor=self.floor) for target, runs in members.items()
        ]

    @cached_property
    def points(self) -> dict[str, Point]:
        return {run.name: run.point for run in self.runs if run.point is not None}

    @cached_property
    def front(self) -> list[str]:
        return pareto_front(self.points)

    @cached_property
    def taken(self) -> Taken | None:
        """The choice by selection.candidates; None before the first result, and if there is no choice."""
        found = [one for run in self.runs if (one := run.candidate(self.floor)) is not None]
        return take(found) if len(found) > 1 else None

    @cached_property
    def chosen(self) -> Run | None:
        """The chosen run; None if there is no choice."""
        return None if self.taken is None else next(run for run in self.runs if run.name == self.taken.name)

    @cached_property
    def datasets(self) -> dict[str, dict[str, Any]]:
        """Every dataset that any run has a result for: key -> its entry in a summary, in the benchmark's order."""
        found: dict[str, dict[str, Any]] = {}
        for run in self.runs:
            for key, entry in (run.summary or {"datasets": {}})["datasets"].items():
                if key not in found or found[key]["baseline"] is None:
                    found[key] = entry
        return found

    @cached_property
    def benchmark(self) -> str | None:
        """Name of the benchmark, None before the first result; several are named together."""
        names = sorted({run.summary["benchmark"] for run in self.runs if run.summary is not None})
        return ", ".join(names) or None

    @cached_property
    def untouched(self) -> dict[str, float]:
        """The untouched model's mean of each complete group; empty until it is evaluated."""
        means = {}
        for run in self.runs:
            groups = {} if run.summary is None else run.summary["groups"]
            for name, group in groups.items():
                if group["change"] is not None and not group["missing"]:
                    means.setdefault(name, group["mean"] - group["change"])
        return means

    def chance(self, group: str) -> float | None:
        """Mean accuracy of guessing over the datasets that count in a group."""
        values = [each["chance"] for each in self.datasets.values() if each["group"] == group and each["in_mean"]]
        return sum(values) / len(values) if values else None
