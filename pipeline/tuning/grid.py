"""From a grid file to trials: pure, and everything is checked before anything starts.

    grid:                        # the product of these lists; a key of the config, or one of the short names
      rank: [2, 8, 32]
      lam: [0.1, 0.3, 1.0]
      train.lr: [1e-3]
    baselines:                   # added to the grid; a list makes alternatives here as well
      - {name: flyp, label: full (FLYP), changes: {kind: full, train.lr: 3e-4}}
      - {name: lora_ungated, changes: {gate.enabled: false, rank: [2, 8, 32]}}
    resources: {workers: 2, cpus_per_worker: 0.5}
    asha: {grace_steps: 100, reduction: 3}

An option whose value is itself a list is written as a list of lists.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, product
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from pipeline.config import Config, ConfigError, Section, describe, digest, override
from pipeline.config.errors import Raw, did_you_mean
from pipeline.config.yaml_file import read_chain
from pipeline.tuning.names import label_of, name_of, value_text

S = TypeVar("S", bound=Section)

ALIASES = {
    "kind": "adapter.kind",
    "rank": "adapter.rank",
    "lam": "gate.lam",
    "penalty": "gate.penalty",
    "seed": "seed",
}
SECTIONS = ("grid", "baselines", "resources", "asha")
MAX_TRIALS = 10_000
# A sweep sets these options for its trials.
RESERVED = ("name", "out", "tracking.uri", "tracking.experiment", "tracking.enabled")


class Resources(Section):
    """Resources of one trial."""

    workers: int = Field(default=1, ge=1, description="training processes of one trial")
    cpus_per_worker: float = Field(default=1.0, gt=0, description="cores of one training process")
    gpus_per_worker: float = Field(
        default=0.0, ge=0, description="GPUs of one training process; with a fraction, processes share one"
    )
    eval_cpus: float = Field(default=1.0, gt=0, description="cores of a trial's evaluation")
    eval_gpus: float | None = Field(default=None, ge=0, description="GPUs of an evaluation; null: gpus_per_worker")
    concurrent: int | None = Field(default=None, ge=1, description="trials at a time; null: as many as fit")
    retries: int = Field(default=2, ge=0, description="how often a trial continues after the death of a worker")


class Asha(Section):
    """Asynchronous halving: at each rung only the trials with the lowest training loss go on."""

    grace_steps: int = Field(ge=1, description="own steps before a trial may be stopped")
    reduction: float = Field(default=3.0, gt=1, description="at each rung, one trial in this number continues")


@dataclass(frozen=True)
class Grid:
    """A grid file as read; keys are dotted. `source` is kept as written for sweep.json."""

    axes: dict[str, list[Any]]
    baselines: tuple[Baseline, ...] = ()
    resources: Resources = field(default_factory=Resources)
    asha: Asha | None = None
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """One or more points in addition to the grid."""

    name: str | None
    label: str | None
    changes: dict[str, list[Any]]


@dataclass(frozen=True)
class Trial:
    """One config of the sweep; `id` is its number and the digest of its config when the sweep was created."""

    id: str
    name: str
    label: str
    changes: dict[str, Any]
    config: Config
    baseline: bool


def load_grid(path: str | Path) -> Grid:
    """Read a grid file; raises ConfigError with every fault of the file in one message."""
    raw = read_chain(path)
    faults: list[str] = []
    axes = {
        _dotted(key.removeprefix("grid."), one, faults): _values(key, one, faults)
        for key, one in raw.items()
        if key.startswith("grid.")
    }
    faults += [
        f"{key}: unknown, a grid file has {', '.join(SECTIONS)} ({raw[key].origin})"
        for key in sorted(raw)
        if key.partition(".")[0] not in SECTIONS
    ]
    baselines = _baselines(raw.get("baselines"), faults)
    resources = _section(Resources, "resources", raw, faults)
    asha = _section(Asha, "asha", raw, faults) if any(key.startswith("asha") for key in raw) else None
    if not axes and not baselines:
        faults.append("grid: names no option to vary, as in grid: {rank: [2, 8], lam: [0.3, 1.0]}")
    if faults:
        raise ConfigError(f"{path}:\n" + "\n".join(faults))
    source = {key: one.value for key, one in raw.items()}
    return Grid(axes, baselines, resources or Resources(), asha, source)


def expand(config: Config, grid: Grid) -> list[Trial]:
    """Every trial of the grid over `config`, the grid's points first; raises ConfigError with all faults at once.

    Points that differ only in options without an effect (rank without blocks, lambda without gates) are one trial.
    """
    every = [grid.axes] * bool(grid.axes) + [each.changes for each in grid.baselines]
    number = sum(prod(len(values) for values in axes.values()) for axes in every)
    if number > MAX_TRIALS:
        raise ConfigError(f"grid: {number} trials, at most {MAX_TRIALS}; give fewer values, or make several sweeps")
    seeds = len(grid.axes.get("seed", ())) > 1
    points = [(changes, None) for changes in _product(grid.axes)] if grid.axes else []
    points += [(changes, each) for each in grid.baselines for changes in _product(each.changes)]
    trials: list[Trial] = []
    seen: dict[Config, str] = {}
    faults: dict[str, None] = {}
    for changes, baseline in points:
        try:
            made = override(config, changes)
        except ConfigError as error:
            faults |= dict.fromkeys(f"{_point(changes)}: {line}" for line in str(error).splitlines())
            continue
        same = _effective(made)
        if same in seen:
            continue
        varied = [key for key, values in (baseline.changes if baseline else grid.axes).items() if len(values) > 1]
        name = name_of(made, changes, varied, seeds=seeds, given=baseline.name if baseline else None)
        if name in seen.values():
            name = f"{name}_{hashlib.sha256(_canonical(changes).encode()).hexdigest()[:4]}"
        seen[same] = name
        label = label_of(made, changes, varied, seeds=seeds, given=baseline.label if baseline else None)
        try:
            placed = override(made, {"name": name, "out": str(Path(config.out).absolute() / config.name / "trials")})
        except ConfigError as error:
            faults |= dict.fromkeys(f"{_point(changes)}: {line}" for line in str(error).splitlines())
            continue
        trials.append(Trial(f"{len(trials):04d}-{digest(made)}", name, label, changes, placed, baseline is not None))
    if faults:
        raise ConfigError("\n".join(faults))
    return trials


def keep_names(trials: Sequence[Trial], stored: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Give the trials of a sweep that exists the ids and names it gave them; new trials are numbered after those.

    An id is made once: a later version may compute another digest, and MLflow and the trial's directory keep the
    first one.

    Args:
        trials: as `expand` made them.
        stored: entries of sweep.json's `trials`; they match by the options changed and by the name up to the suffix
            that tells equal names apart.
    """
    known = {(_canonical(each["changes"]), each["baseline"], _stem(each["name"])): each for each in stored}
    numbers = count(1 + max((int(each["id"].partition("-")[0]) for each in stored), default=-1))
    kept = []
    for trial in trials:
        old = known.get((_canonical(trial.changes), trial.baseline, _stem(trial.name)))
        if old is None:
            kept.append(replace(trial, id=f"{next(numbers):04d}-{digest(trial.config)}"))
        else:
            config = override(trial.config, {"name": old["name"]})
            kept.append(replace(trial, id=old["id"], name=old["name"], config=config))
    return kept


def _canonical(changes: Mapping[str, Any]) -> str:
    return json.dumps(changes, sort_keys=True)


def _stem(name: str) -> str:
    return re.sub(r"_[0-9a-f]{4}$", "", name)


def _effective(config: Config) -> Config:
    """The config with all options that have no effect in it at their defaults; equal results mean equal runs."""
    neutral: dict[str, Any] = {}
    plain = Config.model_validate({"data": {"train": "unset"}})
    if not config.gated:
        neutral |= {f"gate.{name}": value for name, value in plain.gate.model_dump(mode="json").items()}
        neutral["gate.enabled"] = False
    if config.adapter.kind in ("full", "none"):
        defaults = plain.adapter.model_dump(mode="json")
        neutral |= {f"adapter.{name}": value for name, value in defaults.items() if name != "kind"}
    return override(config, neutral)


def _product(axes: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _point(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value_text(value)}" for key, value in changes.items()) or "the base config"


def _dotted(key: str, one: Raw, faults: list[str]) -> str:
    """The config's key for a key of the grid; unknown ones become faults."""
    dotted = ALIASES.get(key, key)
    known = list(describe())
    if dotted in RESERVED:
        faults.append(f"{key}: belongs to the sweep's config, it cannot vary between trials ({one.origin})")
    elif dotted not in known:
        faults.append(f"{key}: unknown option{did_you_mean(key, [*known, *ALIASES])} ({one.origin})")
    return dotted


def _values(key: str, one: Raw, faults: list[str]) -> list[Any]:
    if not isinstance(one.value, list) or not one.value:
        faults.append(f"{key}: should be a list of values, got {one.value!r} ({one.origin})")
        return []
    texts = [value_text(value) for value in one.value]
    faults += [f"{key}: {text} is given twice ({one.origin})" for text in dict.fromkeys(texts) if texts.count(text) > 1]
    return one.value


def _baselines(one: Raw | None, faults: list[str]) -> tuple[Baseline, ...]:
    if one is None:
        return ()
    if not isinstance(one.value, list):
        faults.append(f"baselines: should be a list of {{name, label, changes}} ({one.origin})")
        return ()
    found = []
    for number, entry in enumerate(one.value, start=1):
        where = f"baselines[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("changes"), dict):
            faults.append(f"{where}: needs `changes`, as in {{name: flyp, changes: {{kind: full}}}} ({one.origin})")
            continue
        unknown = sorted(set(entry) - {"name", "label", "changes"})
        faults += [f"{where}.{key}: unknown, a baseline has name, label and changes ({one.origin})" for key in unknown]
        changes = {}
        for key, value in _flat(entry["changes"]).items():
            raw = Raw(value if isinstance(value, list) else [value], one.origin)
            changes[_dotted(key, raw, faults)] = _values(f"{where}.{key}", raw, faults)
        found.append(Baseline(entry.get("name"), entry.get("label"), changes))
    return tuple(found)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys, as the config's own files may be written."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _section(kind: type[S], name: str, raw: Mapping[str, Raw], faults: list[str]) -> S | None:
    values = {key.removeprefix(f"{name}."): one.value for key, one in raw.items() if key.startswith(f"{name}.")}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            key = f"{name}.{'.'.join(str(part) for part in fault['loc'])}"
            origin = f" ({raw[key].origin})" if key in raw else ""
            faults.append(f"{key}: {fault['msg']}; {name} has {', '.join(kind.model_fields)}{origin}")
        return None
