"""A grid file: options that vary, baselines, seeds, and the resources of a trial; checked before anything starts.

    grid:                        # the product of these lists; a key of the config, or one of the short names
      rank: [2, 8, 32]
      lam: [0.1, 0.3, 1.0]
      train.lr: [1e-3]
    baselines:                   # added to the grid; a list makes alternatives here as well
      - {name: flyp, label: full (FLYP), changes: {kind: full, train.lr: 3e-4}}
      - {name: lora_ungated, changes: {gate.enabled: false, rank: [2, 8, 32]}}
    seeds: [0, 1, 2]             # every point and baseline with each seed; the mean over the seeds decides
    soup: true                   # also evaluate the mean of the seeds' weights as a separate model
    search: {trials: 40, sampler: tpe}   # in addition to the grid's points, configurations proposed by a sampler
    ranges:                      # in these ranges; the other options come from the config
      train.lr: {log: [1e-5, 1e-3]}
      lam: {linear: [0.1, 3.0]}
      rank: {choices: [4, 16, 64]}       # or {integers: [4, 64]}
    floor: 0.95                  # trials are compared by id at the largest strength that keeps this share
    max_drift: 0.2               # a trial that drifts further on reference samples is stopped
    resources: {workers: 2, cpus_per_worker: 0.5}
    asha: {grace_steps: 100, reduction: 3}

Write a list of lists for an option whose value is itself a list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from pipeline.config import ConfigError, Section, describe, whole_options
from pipeline.config.errors import Raw, did_you_mean
from pipeline.config.yaml_file import read_chain, read_overrides
from pipeline.tuning.names import value_text
from pipeline.tuning.search import Range, Search

S = TypeVar("S", bound=Section)

ALIASES = {
    "kind": "adapter.kind",
    "rank": "adapter.rank",
    "lam": "gate.lam",
    "penalty": "gate.penalty",
    "seed": "seed",
}
SECTIONS = ("grid", "baselines", "search", "ranges", "seeds", "soup", "floor", "max_drift", "resources", "asha")
OVERRIDABLE = ("floor", "max_drift")  # keys of a grid file that may also be given on the command line
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
    """Asynchronous halving: at each rung only the trials with the lowest training loss continue."""

    grace_steps: int = Field(ge=1, description="own steps before a trial may be stopped")
    reduction: float = Field(default=3.0, gt=1, description="at each rung, one trial in this number continues")


@dataclass(frozen=True)
class Grid:
    """A grid file as read; keys are dotted. `source` is kept as written for sweep.json.

    Attributes:
        search: number of configurations and their sampler; None: only those of the grid.
        ranges: {option: range of the sampler's proposals}.
        seeds: seeds with which every point and baseline is trained; empty: the seed of the config.
        soup: whether the mean of the seeds' weights is evaluated as a separate model.
        floor: share kept at which trials are compared by id; None: compare id and kept at full strength.
        max_drift: drift on held-out reference samples at which a trial is stopped; None: never.
    """

    axes: dict[str, list[Any]]
    baselines: tuple[Baseline, ...] = ()
    search: Search | None = None
    ranges: dict[str, Range] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    soup: bool = False
    floor: float | None = None
    max_drift: float | None = None
    resources: Resources = field(default_factory=Resources)
    asha: Asha | None = None
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """One or more points in addition to the grid."""

    name: str | None
    label: str | None
    changes: dict[str, list[Any]]


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> Grid:
    """Read a grid file; raises ConfigError with every fault of the file in one message.

    Args:
        overrides: `key=value` that replace those of the file, as in floor=0.97.
    """
    changes, wrong = read_overrides(list(overrides))
    raw = read_chain(path) | changes
    faults: list[str] = wrong
    axes = _axes("grid", {key[5:]: one for key, one in raw.items() if key.startswith("grid.")}, faults)
    faults += [
        f"{key}: unknown, a grid file has {', '.join(SECTIONS)} ({raw[key].origin})"
        for key in sorted(raw)
        if key.partition(".")[0] not in SECTIONS
    ]
    baselines = _baselines(raw.get("baselines"), faults)
    search = _section(Search, "search", raw, faults) if any(key.startswith("search") for key in raw) else None
    ranges = _ranges(raw, faults)
    seeds, soup = _seeds(raw.get("seeds"), raw.get("soup"), axes, baselines, faults)
    floor = _number("floor", raw.get("floor"), 1.0, "a share kept above 0, 1 at most, as in 0.95", faults)
    drift = _number("max_drift", raw.get("max_drift"), 2.0, "a distance above 0, 2 at most, as in 0.2", faults)
    resources = _section(Resources, "resources", raw, faults)
    asha = _section(Asha, "asha", raw, faults) if any(key.startswith("asha") for key in raw) else None
    named = {key.partition(".")[0] for key in raw}
    if (search is not None) == ("search" in named) and bool(ranges) == (
        "ranges" in named
    ):  # otherwise there is a fault
        faults += _search_faults(search, ranges, axes, floor)
    if not axes and not baselines and "ranges" not in named:
        faults.append("grid: names no option to vary, as in grid: {rank: [2, 8], lam: [0.3, 1.0]}")
    if faults:
        raise ConfigError("\n".join([f"{path}:", *faults]) if len(faults) > 1 else f"{path}: {faults[0]}")
    source = {key: one.value for key, one in raw.items()}
    return Grid(axes, baselines, search, ranges, seeds, soup, floor, drift, resources or Resources(), asha, source)


def _dotted(key: str, one: Raw, faults: list[str]) -> str:
    """The config's key for a key of the grid; unknown keys become faults."""
    dotted = ALIASES.get(key, key)
    known = list(describe())
    if dotted in RESERVED:
        faults.append(f"{key}: belongs to the sweep's config, it cannot vary between trials ({one.origin})")
    elif dotted not in known:
        faults.append(f"{key}: unknown option{did_you_mean(key, [*known, *ALIASES])} ({one.origin})")
    return dotted


def _axes(where: str, entries: Mapping[str, Raw], faults: list[str]) -> dict[str, list[Any]]:
    """{option: values} of a product; an option under two of its names is a fault."""
    found: dict[str, list[Any]] = {}
    for key, one in entries.items():
        dotted = _dotted(key, one, faults)
        if dotted in found:
            faults.append(f"{where}.{key}: {dotted} is given twice ({one.origin})")
        found[dotted] = _values(f"{where}.{key}", one, faults)
    return found


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
        wrong = (_text_fault(key, entry.get(key)) for key in ("name", "label"))
        faults += [f"{where}.{text} ({one.origin})" for text in wrong if text is not None]
        lists = {
            key: Raw(value if isinstance(value, list) else [value], one.origin)
            for key, value in _flat(entry["changes"]).items()
        }
        changes = _axes(where, lists, faults)
        found.append(Baseline(entry.get("name"), entry.get("label"), changes))
    return tuple(found)


def _text_fault(key: str, value: Any) -> str | None:
    """The fault of a baseline's name or label, if any; a name is the beginning of a directory's name."""
    if value is None:
        return None
    if not isinstance(value, str):
        return f'{key}: should be text, as in {key}: "{value_text(value)}"; got {value!r}'
    if key == "name" and not re.match(r"[A-Za-z0-9_]", value):
        return f"name: should begin with a letter from a to z, a digit or _, got {value!r}"
    return None


def _ranges(raw: Mapping[str, Raw], faults: list[str]) -> dict[str, Range]:
    found: dict[str, Range] = {}
    for key, one in raw.items():
        if key != "ranges" and not key.startswith("ranges."):
            continue
        name, _, kind = key.removeprefix("ranges").removeprefix(".").rpartition(".")
        values = tuple(one.value) if isinstance(one.value, list) else (one.value,)
        if not name:
            faults.append(f"{key}: should be as in ranges: {{train.lr: {{log: [1e-5, 1e-3]}}}} ({one.origin})")
            continue
        each = Range(kind, values, ALIASES.get(name, name) in whole_options())
        if (fault := each.fault()) is not None:
            faults.append(f"ranges.{name}: {fault} ({one.origin})")
        elif (dotted := _dotted(name, one, faults)) in found:
            faults.append(f"ranges.{name}: is given twice ({one.origin})")
        else:
            found[dotted] = each
    return found


def _search_faults(
    search: Search | None, ranges: Mapping[str, Range], axes: Mapping[str, list[Any]], floor: float | None
) -> list[str]:
    if (search is None) != (not ranges):
        return ["search: needs ranges, as in ranges: {train.lr: {log: [1e-5, 1e-3]}}" if search else
                "ranges: need search, as in search: {trials: 40}"]  # fmt: skip
    if search is None:
        return []
    faults = [] if floor is not None else ["search: needs a floor, as in floor: 0.95: trials are compared by id at it"]
    for key, each in ranges.items():
        outside = [value for value in axes.get(key, ()) if not each.holds(value)]
        if outside:
            faults.append(f"grid.{key}: {value_text(outside[0])} is outside ranges.{key}: {each}")
    if "seed" in ranges:
        faults.append("ranges.seed: a seed is not searched for; give seeds: [0, 1, 2]")
    return faults


def _seeds(
    one: Raw | None,
    soup: Raw | None,
    axes: Mapping[str, list[Any]],
    baselines: Sequence[Baseline],
    faults: list[str],
) -> tuple[tuple[int, ...], bool]:
    wanted = False if soup is None else soup.value
    if not isinstance(wanted, bool):
        faults.append(f"soup: should be true or false, got {wanted!r} ({soup.origin if soup else ''})")
    values = [] if one is None else _values("seeds", one, faults)
    if one is not None and not all(
        isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in values
    ):
        faults.append(f"seeds: should be whole numbers, as in [0, 1, 2]; got {values!r} ({one.origin})")
    if one is not None and ("seed" in axes or any("seed" in each.changes for each in baselines)):
        where = "grid" if "seed" in axes else "baselines"
        faults.append(f"seeds: {where} names seed as well; leave it out there ({one.origin})")
    if wanted is True and len(values) < 2:
        faults.append("soup: is the mean of several seeds; name them, as in seeds: [0, 1, 2]")
    return tuple(values), wanted is True


def _number(key: str, one: Raw | None, most: float, what: str, faults: list[str]) -> float | None:
    """A number above 0; None if there is none."""
    if one is None or one.value is None:
        return None
    if not isinstance(one.value, int | float) or isinstance(one.value, bool) or not 0 < one.value <= most:
        faults.append(f"{key}: should be {what}; got {one.value!r} ({one.origin})")
        return None
    return float(one.value)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys, like those of config files."""
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
