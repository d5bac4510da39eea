"""The config: one frozen tree, filled from YAML files, `key=value` and Ray Tune points by the same path.

The options are in sections.py, what each affects in effects.py. Nothing writes into a config after load; values that
follow from others (number of steps, scale of a block) are computed where they are used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from pipeline.config.effects import Effect, Place, Result, effects_of
from pipeline.config.errors import ConfigError, Raw, at, did_you_mean, faults_of
from pipeline.config.sections import Adapter, Data, Eval, Gate, Keep, Model, Promote, Section, Tracking, Train
from pipeline.config.templates import fault_of_templates
from pipeline.config.yaml_file import dump_yaml, read_chain, read_overrides
from pipeline.passwords import redact

DEFAULT = "default"
VIT_SCHEMA = "timm:"


def is_vit(name: str) -> bool:
    """Whether `model.name` names a model of timm, which is trained as a classifier."""
    return name.startswith(VIT_SCHEMA)


class Config(Section):
    """The whole config of one run."""

    name: Place[str] = Field(
        default="run",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+=,@-]*$",
        description="name of the run and of its directory in `out`",
    )
    out: Place[str] = Field(default="runs", min_length=1, description="directory of all runs")
    seed: Result[int] = Field(default=0, ge=0, lt=2**63, description="seed of every random draw")
    model: Model = Field(default_factory=Model)
    adapter: Adapter = Field(default_factory=Adapter)
    gate: Gate = Field(default_factory=Gate)
    train: Train = Field(default_factory=Train)
    keep: Keep = Field(default_factory=Keep)
    data: Data
    eval: Eval = Field(default_factory=Eval)
    tracking: Tracking = Field(default_factory=Tracking)
    promote: Promote = Field(default_factory=Promote)

    @property
    def gated(self) -> bool:
        """Whether the blocks of this run carry gates; random_k implies that they do not."""
        return self.gate.enabled and self.adapter.random_k is None and self.adapter.kind in ("lora", "dora")

    @property
    def classifies(self) -> bool:
        """Whether the model is a ViT that is trained as a classifier, instead of a CLIP."""
        return is_vit(self.model.name)

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        faults = [message for _, message in conflicts(self)]
        if faults:
            raise ValueError("\n".join(faults))
        return self


def conflicts(config: Config) -> Iterator[tuple[set[str], str]]:
    """Conflicts between the options of `config`, as (keys involved, message)."""
    adapter, gate, train, data = config.adapter, config.gate, config.train, config.data
    if train.global_batch_size % data.streams:
        yield (
            {"train.global_batch_size", "data.streams"},
            f"train.global_batch_size: {train.global_batch_size} should be a multiple of data.streams ({data.streams})",
        )
    if config.gated and gate.init < gate.threshold:
        yield (
            {"gate.init", "gate.threshold"},
            f"gate.init: {gate.init} is below gate.threshold ({gate.threshold}): every gate would start closed",
        )
    if config.gated and gate.settle_steps is not None and gate.settle_margin >= gate.threshold:
        yield (
            {"gate.settle_margin", "gate.settle_steps", "gate.threshold"},
            f"gate.settle_margin: {gate.settle_margin} should be below gate.threshold ({gate.threshold}), "
            f"or no score can be low enough to settle",
        )
    yield from _budget_conflicts(config)
    # A classifier's head trains in any case: that is the linear probe.
    if adapter.kind == "none" and train.train_rest == "none" and not config.classifies:
        yield (
            {"adapter.kind", "train.train_rest"},
            "adapter.kind: none together with train.train_rest: none trains nothing",
        )
    yield from _compiling_conflicts(train)
    yield from _learning_conflicts(config)
    for key, values in (("adapter.towers", adapter.towers), ("adapter.projections", adapter.projections)):
        if len(set(values)) < len(values):
            yield {key}, f"{key}: {', '.join(values)} names a value twice"
    if not all(0 <= beta < 1 for beta in train.betas):
        yield {"train.betas"}, f"train.betas: {list(train.betas)} should be in 0 <= beta < 1"
    if not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
        yield {"data.crop_scale"}, f"data.crop_scale: {list(data.crop_scale)} should be 0 < low <= high <= 1"
    try:
        config.promote.floors()
    except ValueError as error:
        yield {"promote.min_dataset"}, str(error)
    if (fault := fault_of_templates(data.templates)) is not None:
        yield {"data.templates"}, f"data.templates: {fault}"


def _budget_conflicts(config: Config) -> Iterator[tuple[set[str], str]]:
    gate = config.gate
    if not gate.budgeted:
        return
    key = "gate.budget" if gate.budget is not None else "gate.budget_parameters"
    budget = gate.budget if gate.budget is not None else gate.budget_parameters
    if gate.budget is not None and gate.budget_parameters is not None:
        yield (
            {"gate.budget", "gate.budget_parameters"},
            f"gate.budget: {gate.budget:g} counts blocks and gate.budget_parameters: {gate.budget_parameters} their "
            "parameters; give one of them",
        )
    if gate.budget is not None and gate.budget >= 1 and gate.budget != int(gate.budget):
        yield {"gate.budget"}, f"gate.budget: {gate.budget} should be a whole number of blocks, or a share below 1"
    if not config.gated:
        yield (
            {key, "gate.enabled", "adapter.kind", "adapter.random_k"},
            f"{key}: {budget:g} needs gates: gate.enabled=true, adapter.kind lora or dora, no adapter.random_k",
        )
    elif gate.lam > 0:
        yield (
            {key, "gate.lam"},
            f"{key}: {budget:g} and gate.lam: {gate.lam:g} both decide which blocks close; set gate.lam=0",
        )
    if gate.settle_steps is not None:
        yield (
            {key, "gate.settle_steps"},
            f"gate.settle_steps: closed blocks leave by themselves once {key} has fixed the set; leave it out",
        )


def _compiling_conflicts(train: Train) -> Iterator[tuple[set[str], str]]:
    again = {
        "train.micro_batch_size": train.micro_batch_size,
        "train.activation_checkpointing": train.activation_checkpointing,
    }
    for key, value in again.items():
        if value and train.compile is True and train.zero_stage == 3:
            yield (
                {"train.compile", "train.zero_stage", key},
                f"train.compile: true excludes {key} under train.zero_stage=3, which would reduce gradients "
                "twice; take stage 2 or leave one of them out",
            )


def _learning_conflicts(config: Config) -> Iterator[tuple[set[str], str]]:
    keep = config.keep
    if config.train.positives == "class" and config.classifies:
        yield (
            {"train.positives", "model.name"},
            f"train.positives: class is for a CLIP, and {config.model.name} is trained as a classifier; use own",
        )
    if config.train.loss != "auto" and config.classifies:
        yield (
            {"train.loss", "model.name"},
            f"train.loss: {config.train.loss} is for a CLIP, and {config.model.name} is trained as a classifier; use "
            "auto",
        )
    if keep.weight and keep.images is None and (keep.texts is None or config.classifies):
        texts = "" if config.classifies else "keep.texts=general or "
        yield (
            {"keep.weight", "keep.images", "keep.texts", "model.name"},
            f"keep.weight: {keep.weight:g} without any reference data; set {texts}keep.images=SHARDS, or keep.weight=0",
        )
    if keep.replay and (keep.images is None or config.classifies):
        why = "a classifier has no captions" if config.classifies else "set keep.images to shards with captions"
        yield (
            {"keep.replay", "keep.images", "model.name"},
            f"keep.replay: {keep.replay:g} needs captioned images; {why}",
        )
    if keep.replay and not keep.weight:
        yield {"keep.replay", "keep.weight"}, "keep.replay: has no effect while keep.weight is 0; set keep.weight=3"


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read, merge and check a config file; raises ConfigError with every fault in one message."""
    return load_config_with_origin(path, overrides)[0]


def load_config_with_origin(path: str | Path, overrides: list[str] | None = None) -> tuple[Config, dict[str, str]]:
    """Like `load_config`, with the origin of each dotted key's value: default, file:line or command line."""
    changes, faults = read_overrides(overrides or [])
    raw = read_chain(path) | changes
    config = _resolve(raw, faults)
    return config, {key: raw[key].origin if key in raw else DEFAULT for key in describe()}


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A new config with `changes` ({dotted key: value}) applied and everything checked again."""
    raw = {key: Raw(value, "") for key, value in _leaves(config).items()}
    return _resolve(raw | {key: Raw(value, "override") for key, value in changes.items()}, [])


def flatten(config: Config) -> dict[str, str | int | float | bool | None]:
    """{dotted key: scalar} in the order of the tree, without passwords; a list becomes the YAML text `[a, b]`."""
    return {
        key: "[" + ", ".join(dump_yaml(each).splitlines()[0] for each in value) + "]"
        if isinstance(value, list)
        else value
        for key, value in _without_passwords(_leaves(config)).items()
    }


def to_yaml(config: Config) -> str:
    """The whole config as YAML that `load_config` reads back as an equal config.

    Only passwords in addresses are left out, as ***, because the file is kept, copied and uploaded. If one is needed
    again, tracking/mlflow/uris.py finds that of `tracking.uri` and data/storage/folders.py that of a store.
    """
    return dump_yaml(_without_passwords(config.model_dump(mode="json")))


def _without_passwords(value: Any) -> Any:
    """A plain value with redact() over every text in it."""
    if isinstance(value, dict):
        return {key: _without_passwords(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_passwords(each) for each in value]
    return redact(value) if isinstance(value, str) else value


def digest(config: Config) -> str:
    """12 hex digits over the options that affect the trained weights: equal for runs that train the same."""
    content = {key: value for key, value in _without_passwords(_leaves(config)).items() if affects_result(key)}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def effects() -> Mapping[str, Effect]:
    """{dotted key: what it affects} of every option, in the order of the tree."""
    return effects_of(Config)


def affects_result(key: str) -> bool:
    """Whether an option affects the trained weights; one that this version does not know is taken to."""
    return effects().get(key, Effect.RESULT) is Effect.RESULT


def describe() -> dict[str, str]:
    """{dotted key: one-line description} of every option, in the order of the tree."""
    return {key: field.description or "" for key, field in _options(Config, "")}


def whole_options() -> frozenset[str]:
    """Dotted keys of the options whose values are whole numbers."""
    kinds = {key: {field.annotation, *get_args(field.annotation)} for key, field in _options(Config, "")}
    return frozenset(key for key, types in kinds.items() if int in types and float not in types)


def _options(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every option in a section and in the sections inside it."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _options(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _leaves(config: Config) -> dict[str, Any]:
    """{dotted key: plain value}, tuples as lists."""
    tree = config.model_dump(mode="json")
    leaves: dict[str, Any] = {}
    for key in describe():
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        leaves[key] = value
    return leaves


def _resolve(raw: Mapping[str, Raw], faults: list[str]) -> Config:
    """Build the config or raise one ConfigError that lists `faults` and everything found here."""
    known = describe()
    sections = {key.rpartition(".")[0] for key in known} - {""}
    faults = list(faults)
    values: dict[str, Any] = {}
    for key, (value, origin) in raw.items():
        if key in known:
            values[key] = value
        elif key not in sections:
            faults.append(f"{key}: unknown option{did_you_mean(key, list(known))}{at(origin)}")
        elif value not in (None, {}):  # an empty section is not a mistake
            faults.append(
                f"{key}: is a section with options such as {key}.{_first(key, known)}, got {value!r}{at(origin)}"
            )
    config, wrong = _validate(values, raw)
    faults += wrong
    if faults or config is None:
        raise ConfigError(redact("\n".join(faults)))
    return config


def _validate(values: dict[str, Any], raw: Mapping[str, Raw]) -> tuple[Config | None, list[str]]:
    try:
        return Config.model_validate(_nest(values)), []
    except ValidationError as error:
        found = faults_of(error, dict(_options(Config, "")), raw)
    wrong = {key for key, _ in found if key}
    if wrong:  # conflicts among the valid values are reported in the same message
        found += _conflicts_without(values, wrong)
    return None, list(dict.fromkeys(message for _, message in found))


def _conflicts_without(values: dict[str, Any], wrong: set[str]) -> list[tuple[str, str]]:
    sound = {key: value for key, value in values.items() if key not in wrong}
    draft = _nest({"data.train": "unset"} | sound)
    sections = {
        name: field.annotation.model_validate(draft[name])  # type: ignore[union-attr]
        for name, field in Config.model_fields.items()
        if isinstance(draft.get(name), dict)
    }
    broken = conflicts(Config.model_construct(**sections))
    return [("", message) for keys, message in broken if not keys & wrong]


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {"data": {}}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree


def _first(section: str, known: Mapping[str, str]) -> str:
    return next(key for key in known if key.startswith(f"{section}.")).removeprefix(f"{section}.")
