"""From a grid to trials, as pure functions; every point is checked before anything starts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, product
from math import prod
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError, digest, override
from pipeline.tuning.grid import Baseline, Grid
from pipeline.tuning.names import label_of, name_of, value_text

MAX_TRIALS = 10_000
_SEED = re.compile(r"_seed\d+")


@dataclass(frozen=True)
class Trial:
    """One config of the sweep.

    Attributes:
        id: its number and the digest of its config when the sweep was created.
        changes: {option: value} over the config of the sweep.
        configuration: the same for trials that differ only in one of the grid's `seeds`.
        soup_of: names of the trials that it averages; empty for a trial that trains.
        proposed: whether a sampler proposed it.
    """

    id: str
    name: str
    label: str
    changes: dict[str, Any]
    config: Config
    baseline: bool
    configuration: str = ""
    soup_of: tuple[str, ...] = ()
    proposed: bool = False


@dataclass(frozen=True)
class GridPoint:
    """The changes of one trial, before it has a name."""

    changes: dict[str, Any]
    varied: Sequence[str]
    baseline: Baseline | None = None
    proposed: bool = False


class Expansion:
    """Makes trials from points over one config, each once, and collects their faults."""

    def __init__(self, config: Config, grid: Grid) -> None:
        self.trials: list[Trial] = []
        self.faults: dict[str, None] = {}
        self._config, self._grid = config, grid
        self._seen: set[Config] = set()
        self._owners: dict[str, str] = {}
        self._place = str(Path(config.out).absolute() / config.name / "trials")
        self._seed_in_names = len(grid.axes.get("seed", ())) > 1

    def add(self, point: GridPoint) -> list[Trial]:
        """The new trials of a point: one, or one for each seed and their soup."""
        seeds: Sequence[int | None] = self._grid.seeds or (None,)
        made = [one for seed in seeds if (one := self._trial(point, seed)) is not None]
        if self._grid.soup and len(made) > 1:
            made.append(_soup(made))
        for one in made:
            self.trials.append(replace(one, id=f"{len(self.trials):04d}-{digest(one.config)}"))
        return self.trials[len(self.trials) - len(made) :]

    def _trial(self, point: GridPoint, seed: int | None) -> Trial | None:
        changes = point.changes if seed is None else {**point.changes, "seed": seed}
        try:
            made = override(self._config, changes)
            same = _effective(made)
            if same in self._seen:
                return None
            self._seen.add(same)
            configuration, label = self._names(made, point)
            numbered = seed is not None and len(self._grid.seeds) > 1
            name = f"{configuration}_seed{seed}" if numbered else configuration
            label = f"{label} seed {seed}" if numbered else label
            placed = override(made, {"name": name, "out": self._place})
        except ConfigError as error:
            self.faults |= dict.fromkeys(f"{point_text(changes)}: {line}" for line in str(error).splitlines())
            return None
        baseline = point.baseline is not None
        return Trial("", name, label, changes, placed, baseline, configuration, proposed=point.proposed)

    def _names(self, made: Config, point: GridPoint) -> tuple[str, str]:
        """Name and label of a configuration, without the grid's `seeds`."""
        given, seeds, which = point.baseline, self._seed_in_names, _canonical(point.changes)
        name = name_of(made, point.changes, point.varied, seeds=seeds, given=given.name if given else None)
        if self._owners.setdefault(name, which) != which:
            name = f"{name}_{hashlib.sha256(which.encode()).hexdigest()[:4]}"
        return name, label_of(made, point.changes, point.varied, seeds=seeds, given=given.label if given else None)


def expand(config: Config, grid: Grid, stored: Sequence[Mapping[str, Any]] = ()) -> list[Trial]:
    """All trials of the grid over `config`, the grid's points first; raises ConfigError with all faults at once.

    Points that differ only in options without an effect (rank without blocks, lambda without gates) are one trial.

    Args:
        stored: entries of sweep.json's `trials`, which is the only place of a sampler's proposals.
    """
    every = [grid.axes] * bool(grid.axes) + [each.changes for each in grid.baselines]
    number = sum(prod(len(values) for values in axes.values()) for axes in every) * max(1, len(grid.seeds))
    number += grid.search.trials if grid.search is not None else 0
    if number > MAX_TRIALS:
        raise ConfigError(f"grid: {number} trials, at most {MAX_TRIALS}; give fewer values, or make several sweeps")
    expansion = Expansion(config, grid)
    for point in (*points_of(grid), *proposed_points(stored)):
        expansion.add(point)
    if expansion.faults:
        raise ConfigError("\n".join(expansion.faults))
    return expansion.trials


def points_of(grid: Grid) -> Iterator[GridPoint]:
    """The points of a grid and its baselines; a search without points starts from the config itself."""
    for changes in _product(grid.axes) if grid.axes or grid.search is not None else ():
        yield GridPoint(changes, _varied(grid.axes))
    for each in grid.baselines:
        for changes in _product(each.changes):
            yield GridPoint(changes, _varied(each.changes), each)


def proposed_points(stored: Sequence[Mapping[str, Any]]) -> list[GridPoint]:
    """The configurations that a sampler proposed in earlier calls, each once, in the order of the proposals."""
    found: dict[str, GridPoint] = {}
    for entry in stored:
        if entry.get("proposed"):
            changes = {key: value for key, value in entry["changes"].items() if key != "seed"}
            found.setdefault(_canonical(changes), GridPoint(changes, list(changes), proposed=True))
    return list(found.values())


def keep_names(trials: Sequence[Trial], stored: Sequence[Mapping[str, Any]], seed: int) -> list[Trial]:
    """Keep the ids and names of an existing sweep's trials; new trials are numbered after them.

    An id never changes: a later version may compute another digest, but MLflow and the trial's directory have the first
    one.

    Args:
        trials: trials from `expand`.
        stored: entries of sweep.json's `trials`; they match by the changed options and by the name, without the suffix
            that distinguishes equal names.
        seed: seed of the sweep's config; a trial that names this seed equals one that inherits it.
    """
    known = {_key(each["changes"], each["baseline"], each["name"], seed): each for each in stored}
    numbers = count(1 + max((int(each["id"].partition("-")[0]) for each in stored), default=-1))
    kept, renamed = [], {}
    for trial in trials:
        old = known.get(_key(trial.changes, trial.baseline, trial.name, seed))
        if old is None:
            trial = replace(trial, id=f"{next(numbers):04d}-{digest(trial.config)}")
        else:
            renamed[trial.name] = old["name"]
            trial = replace(trial, id=old["id"], name=old["name"], config=override(trial.config, {"name": old["name"]}))
        kept.append(replace(trial, soup_of=tuple(renamed.get(name, name) for name in trial.soup_of)))
    return kept


def point_text(changes: Mapping[str, Any]) -> str:
    """ "adapter.rank=2, gate.lam=0.3", for messages."""
    return ", ".join(f"{key}={value_text(value)}" for key, value in changes.items()) or "the base config"


def _soup(seeds: Sequence[Trial]) -> Trial:
    """The mean of trained models, in the form of a full fine-tuning without gates and blocks."""
    first = seeds[0]
    name = f"{first.configuration}_soup"
    whole = {"adapter.kind": "full", "gate.enabled": False, "gate.settle_steps": None}
    whole |= {"gate.budget": None, "gate.budget_parameters": None}
    changes = {key: value for key, value in first.changes.items() if key != "seed"}
    label = re.sub(r" seed \d+$", "", first.label) + f", soup of {len(seeds)}"
    config = override(first.config, {**whole, "name": name})
    of = tuple(one.name for one in seeds)
    return Trial("", name, label, changes, config, first.baseline, name, of, first.proposed)


def _key(changes: Mapping[str, Any], baseline: bool, name: str, seed: int) -> tuple[str, bool, str]:
    """The key of a trial; naming the config's own seed makes no difference."""
    soup = name.endswith("_soup")
    seeded = dict(changes) if soup else {"seed": seed, **changes}
    return _canonical(seeded), baseline, re.sub(r"_[0-9a-f]{4}$", "", _SEED.sub("", name))


def _varied(axes: Mapping[str, list[Any]]) -> list[str]:
    return [key for key, values in axes.items() if len(values) > 1]


def _canonical(changes: Mapping[str, Any]) -> str:
    return json.dumps(changes, sort_keys=True)


def _effective(config: Config) -> Config:
    """The config with all options without effect at their defaults; equal results mean equal runs."""
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
