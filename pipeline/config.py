"""The config: one frozen tree, filled from YAML files, `key=value` and Ray Tune points by the same path.

Every option stands here once, with its type, range, default and unit. Nothing writes into a config after load; values
that follow from others (number of steps, scale of a block) are computed where they are used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.config_faults import at, did_you_mean, faults_of
from pipeline.config_file import ConfigError, Raw, dump_yaml, read_chain, read_overrides

__all__ = [
    "Adapter",
    "Config",
    "ConfigError",
    "Data",
    "Eval",
    "Gate",
    "Model",
    "Promote",
    "Tracking",
    "Train",
    "describe",
    "digest",
    "flatten",
    "load_config",
    "load_config_with_origin",
    "override",
    "to_yaml",
]

DEFAULT = "default"

Tower = Literal["image", "text"]
Projection = Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
_FromList = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Towers = Annotated[tuple[Tower, ...], _FromList]
Projections = Annotated[tuple[Projection, ...], _FromList]
Texts = Annotated[tuple[str, ...], _FromList]
Pair = Annotated[tuple[float, float], _FromList]
_FLOOR = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*>=\s*(\d+(?:\.\d*)?|\.\d+)\s*")


class Section(BaseModel):
    """Strict: a bool is no number, "4" is no count, inf and nan are no value, an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(Section):
    name: str = Field(
        default="ViT-B-16-quickgelu", min_length=1, description="open_clip name, local-dir:PATH or hf-hub:ORG/NAME"
    )
    pretrained: str | None = Field(
        default=None, description="open_clip tag (openai) or weights file; null: as the name says, or random"
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="precision of the frozen weights and activations"
    )


class Adapter(Section):
    kind: Literal["full", "none", "lora", "dora"] = Field(
        default="lora", description="full: every weight trains (FLYP); none: no block, only train_rest"
    )
    rank: int = Field(default=16, ge=1, description="rank of each block")
    alpha: float | None = Field(default=None, gt=0, description="a block is scaled by alpha / rank; null: scale 1")
    towers: Towers = Field(default=("image", "text"), min_length=1, description="towers that carry blocks")
    projections: Projections = Field(
        default=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        min_length=1,
        description="linears that carry blocks",
    )
    targets: Texts | None = Field(
        default=None,
        min_length=1,
        description="globs over target names (image.3.q_proj), instead of towers and projections",
    )
    random_k: int | None = Field(
        default=None, ge=1, description="baseline: this many blocks drawn by seed, always on, no gate"
    )


class Gate(Section):
    enabled: bool = Field(
        default=True, description="each block carries a learned gate (never for random_k, full, none)"
    )
    threshold: float = Field(default=0.1, ge=0, description="tau: a gate is open where its score >= tau")
    init: float = Field(default=0.15, ge=0, description="score of every gate before training")
    penalty: Literal["l1", "l2", "hinge"] = Field(
        default="l1", description="form of the sparsity penalty on the scores"
    )
    reduction: Literal["mean", "sum"] = Field(
        default="mean", description="over the scores; sum is the paper's eq. 4 to the letter"
    )
    lam: float = Field(default=1.0, ge=0, description="lambda, weight of the penalty")
    delay_steps: int = Field(default=0, ge=0, description="optimizer steps before the penalty sets in")
    lr: float | None = Field(default=None, gt=0, description="learning rate of the scores; null: train.lr")


class Train(Section):
    train_rest: Literal["all", "proj_ln", "none"] = Field(
        default="all", description="what trains outside the transformer layers; proj_ln: projections and outer norms"
    )
    lr: float = Field(default=1e-5, gt=0, description="peak learning rate")
    rest_lr: float | None = Field(default=None, gt=0, description="peak learning rate of train_rest; null: lr")
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW; never on scores, magnitudes, logit scale")
    betas: Pair = Field(default=(0.9, 0.999), description="AdamW betas")
    eps: float = Field(default=1e-8, gt=0, description="AdamW eps")
    warmup_steps: int = Field(default=500, ge=0, description="optimizer steps of linear warmup, then cosine to 0")
    epochs: float = Field(default=10.0, gt=0, description="passes over the images")
    steps: int | None = Field(default=None, ge=1, description="optimizer steps, instead of epochs")
    global_batch_size: int = Field(default=512, ge=2, description="images of one optimizer step over all ranks")
    grad_clip: float | None = Field(default=None, gt=0, description="largest norm of the gradient; null: no clipping")
    zero_stage: int = Field(default=1, ge=0, le=3, description="DeepSpeed ZeRO stage")
    log_every: int = Field(default=10, ge=1, description="steps between records of losses and speed")
    gates_every: int = Field(default=50, ge=1, description="steps between records of every gate")
    checkpoint_every: int = Field(
        default=500, ge=1, description="steps between checkpoints; the last step always has one"
    )
    keep_last: int = Field(default=2, ge=1, description="checkpoints kept on disk")
    timeout_s: float = Field(
        default=1800.0, gt=0, description="seconds that ranks wait for each other, at the start and in any collective"
    )


class Data(Section):
    train: str = Field(min_length=1, description="directory or URL of training shards (made by selora pack)")
    streams: int = Field(default=64, ge=1, description="equal parts of an epoch; ranks must divide it")
    shuffle_window: int = Field(default=2048, ge=1, description="samples among which a stream is shuffled")
    workers: int = Field(default=2, ge=0, description="decoding processes per rank; 0: in the training process")
    templates: str | Texts = Field(
        default="openai", min_length=1, description="name of a caption template set, or a list with {c}"
    )
    crop_scale: Pair = Field(
        default=(0.9, 1.0), description="share of the image area kept by the random crop, low and high"
    )
    preprocessing: Literal["fast", "reference"] = Field(
        default="fast", description="reference: PIL, for published numbers"
    )
    max_bad_share: float = Field(default=0.001, ge=0, le=1, description="share of unreadable images that stops the run")
    max_pixels: int = Field(default=2**28, ge=1, description="an image with more pixels counts as unreadable")


class Eval(Section):
    benchmark: str | None = Field(
        default=None, description="evaluation datasets: paper, quick, wds, or a YAML file; null: no evaluation"
    )
    root: str | None = Field(
        default=None, min_length=1, description="where the benchmark's datasets lie; null: as its file says"
    )
    batch_size: int = Field(default=64, ge=1, description="images per rank and forward")
    workers: int = Field(default=2, ge=0, description="decoding processes per rank")
    preprocessing: Literal["fast", "reference"] = Field(
        default="reference", description="of a sweep's evaluations; reference: PIL, for published numbers"
    )


class Tracking(Section):
    uri: str | None = Field(
        default=None, min_length=1, description="MLflow tracking server; null: sqlite:///OUT/mlflow.db"
    )
    experiment: str = Field(default="selora", min_length=1, description="MLflow experiment")
    enabled: bool = Field(default=True, description="send the journal to MLflow; the journal itself is always written")
    machine_every_s: float | None = Field(
        default=None, gt=0, description="seconds between samples of every node's CPU, memory and GPUs; null: none"
    )


class Promote(Section):
    """What a run must reach before it enters the registry; accuracies and their changes are shares, 0.02 = 2 points."""

    min_id: float | None = Field(default=None, ge=0, le=1, description="smallest mean accuracy of the id group")
    min_gain: float | None = Field(
        default=None, ge=-1, le=1, description="smallest rise of the id mean over the untouched model"
    )
    max_forgetting: float | None = Field(
        default=None, ge=-1, le=1, description="largest mean drop over the groups other than id"
    )
    max_drop: float | None = Field(
        default=None, ge=-1, le=1, description="largest drop of any one dataset against the untouched model"
    )
    min_dataset: Texts | None = Field(
        default=None, min_length=1, description="smallest result of single datasets, as in ['pets >= 0.85']"
    )
    champion: Literal["by_hand", "if_better", "always"] = Field(
        default="by_hand",
        description="when a version becomes champion; if_better: no worse than it in id and forgetting, better in one",
    )

    def floors(self) -> dict[str, float]:
        """{dataset: smallest result} of min_dataset; ValueError for an entry that is no `KEY >= SHARE`."""
        floors = {}
        for entry in self.min_dataset or ():
            found = _FLOOR.fullmatch(entry)
            if found is None or float(found[2]) > 1:
                raise ValueError(f"promote.min_dataset: {entry!r} should be KEY >= SHARE, as in pets >= 0.85")
            floors[found[1]] = float(found[2])
        return floors


class Config(Section):
    """The whole config of one run."""

    name: str = Field(
        default="run", pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+=,@-]*$", description="the run's directory below `out`"
    )
    out: str = Field(default="runs", min_length=1, description="directory that holds the runs")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of everything that is drawn")
    model: Model = Field(default_factory=Model)
    adapter: Adapter = Field(default_factory=Adapter)
    gate: Gate = Field(default_factory=Gate)
    train: Train = Field(default_factory=Train)
    data: Data
    eval: Eval = Field(default_factory=Eval)
    tracking: Tracking = Field(default_factory=Tracking)
    promote: Promote = Field(default_factory=Promote)

    @property
    def gated(self) -> bool:
        """Whether the blocks of this run carry gates; random_k implies that they do not."""
        return self.gate.enabled and self.adapter.random_k is None and self.adapter.kind in ("lora", "dora")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        faults = [message for _, message in broken_rules(self)]
        if faults:
            raise ValueError("\n".join(faults))
        return self


def broken_rules(config: Config) -> Iterator[tuple[set[str], str]]:
    """Rules between options that `config` breaks, as (keys involved, message)."""
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
    if adapter.kind == "none" and train.train_rest == "none":
        yield (
            {"adapter.kind", "train.train_rest"},
            "adapter.kind: none together with train.train_rest: none trains nothing",
        )
    for key, values in (("adapter.towers", adapter.towers), ("adapter.projections", adapter.projections)):
        if len(set(values)) < len(values):
            yield {key}, f"{key}: {', '.join(values)} names one twice"
    if not all(0 <= beta < 1 for beta in train.betas):
        yield {"train.betas"}, f"train.betas: {list(train.betas)} should lie in 0 <= beta < 1"
    if not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
        yield {"data.crop_scale"}, f"data.crop_scale: {list(data.crop_scale)} should be 0 < low <= high <= 1"
    try:
        config.promote.floors()
    except ValueError as error:
        yield {"promote.min_dataset"}, str(error)
    for template in data.templates if isinstance(data.templates, tuple) else ():
        if "{c}" not in template:
            yield {"data.templates"}, f"data.templates: {template!r} has no {{c}} for the class name"


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read, merge and check a config file; raises ConfigError with every fault in one message."""
    return load_config_with_origin(path, overrides)[0]


def load_config_with_origin(path: str | Path, overrides: list[str] | None = None) -> tuple[Config, dict[str, str]]:
    """Like `load_config`, and for each dotted key where its value came from: default, file:line or command line."""
    changes, faults = read_overrides(overrides or [])
    raw = read_chain(path) | changes
    config = _resolve(raw, faults)
    return config, {key: raw[key].origin if key in raw else DEFAULT for key in describe()}


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A new config with `changes` ({dotted key: value}) applied and everything checked again."""
    raw = {key: Raw(value, "") for key, value in _leaves(config).items()}
    return _resolve(raw | {key: Raw(value, "override") for key, value in changes.items()}, [])


def flatten(config: Config) -> dict[str, str | int | float | bool | None]:
    """{dotted key: scalar} in the order of the tree; a list becomes the YAML text `[a, b]`."""
    return {
        key: "[" + ", ".join(dump_yaml(each).splitlines()[0] for each in value) + "]"
        if isinstance(value, list)
        else value
        for key, value in _leaves(config).items()
    }


def to_yaml(config: Config) -> str:
    """The whole config as YAML that `load_config` reads back as an equal config."""
    return dump_yaml(config.model_dump(mode="json"))


def digest(config: Config) -> str:
    """12 hex digits over what decides the result, which name, place, tracking and the rule of promotion do not."""
    content = config.model_dump(
        mode="json",
        exclude={
            "name": True,
            "out": True,
            "tracking": True,
            "promote": True,
            "eval": {"root"},
            "train": {"timeout_s"},
        },
    )
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def describe() -> dict[str, str]:
    """{dotted key: one-line description} of every option, in the order of the tree."""
    return dict(_describe(Config, ""))


def _describe(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _describe(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.description or ""


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
        elif value not in (None, {}):  # an empty section is no mistake
            faults.append(
                f"{key}: is a section with options such as {key}.{_first(key, known)}, got {value!r}{at(origin)}"
            )
    config, wrong = _validate(values, raw)
    faults += wrong
    if faults or config is None:
        raise ConfigError("\n".join(faults))
    return config


def _validate(values: dict[str, Any], raw: Mapping[str, Raw]) -> tuple[Config | None, list[str]]:
    try:
        return Config.model_validate(_nest(values)), []
    except ValidationError as error:
        found = faults_of(error, describe(), raw)
    wrong = {key for key, _ in found if key}
    if wrong:  # what the sound values say about each other: they are reported in the same message
        found += _rules_without(values, wrong)
    return None, list(dict.fromkeys(message for _, message in found))


def _rules_without(values: dict[str, Any], wrong: set[str]) -> list[tuple[str, str]]:
    sound = {key: value for key, value in values.items() if key not in wrong}
    draft = _nest({"data.train": "unset"} | sound)
    sections = {
        name: field.annotation.model_validate(draft[name])  # type: ignore[union-attr]
        for name, field in Config.model_fields.items()
        if isinstance(draft.get(name), dict)
    }
    broken = broken_rules(Config.model_construct(**sections))
    return [("", message) for keys, message in broken if not keys & wrong]


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {"data": {}}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree


def _first(section: str, known: Mapping[str, str]) -> str:
    return next(key for key in known if key.startswith(f"{section}.")).removeprefix(f"{section}.")
