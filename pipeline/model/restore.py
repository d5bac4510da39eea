"""The fine-tuned model of a run directory: base, blocks and checkpoint, combined and merged."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.config import VIT_SCHEMA as SCHEMA
from pipeline.config import ConfigError, is_vit
from pipeline.config.yaml_file import read_chain
from pipeline.method.adapter import attach_adapter, merge_adapter
from pipeline.method.contrastive import MAX_LOGIT_SCALE
from pipeline.model.clip import Clip, with_logit_bias
from pipeline.model.load import Model, load_model
from pipeline.model.towers import adapter_targets, apply_trainable
from pipeline.model.weights import has_bias
from pipeline.runs.run import (
    CONFIG_FILE,
    checkpoint_dir,
    is_run,
    kept_steps,
    latest_step,
    read_base,
    read_checkpoint,
    write_base,
)


@dataclass(frozen=True)
class RunSource:
    """The sources of a run's weights: its newest (or a chosen) checkpoint and the base it was trained on."""

    checkpoint: Path
    state: dict[str, Any]
    train_rest: str

    @property
    def base_digest(self) -> str:
        return self.state["base_digest"]

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def label(self) -> str:
        """ "run-name/step-00000123", for messages and result files."""
        return f"{self.checkpoint.parent.parent.name}/{self.checkpoint.name}"


def check_exists(run_or_model: str | Path) -> None:
    """Refuse a path that does not exist before it is taken for a model's name (such as `ViT-B/16`)."""
    from pipeline.model.clip import is_architecture

    name = str(run_or_model)
    if "/" in name and ":" not in name and not Path(name).exists() and not is_architecture(name):
        raise ConfigError(f"{name}: no such run; a plain model is named as in model.name, ViT-B-16-quickgelu")


def find_run(run_dir: str | Path, step: int | None = None) -> RunSource:
    """The checkpoint of `step`, or the newest. ConfigError when there is none or its files are damaged."""
    run_dir = Path(run_dir)
    if not is_run(run_dir):
        raise ConfigError(f"{run_dir} is not a run directory: it has no {CONFIG_FILE}")
    wanted = latest_step(run_dir) if step is None else step
    if wanted is None:
        raise ConfigError(f"{run_dir} has no checkpoint yet: train it first")
    try:
        found = read_checkpoint(run_dir, wanted)
    except FileNotFoundError:
        present = ", ".join(checkpoint_dir(run_dir, each).name for each in kept_steps(run_dir)) or "none"
        name = checkpoint_dir(run_dir, wanted).name
        raise ConfigError(f"{run_dir} has no checkpoint {name}; there are: {present}") from None
    train_rest = read_chain(run_dir / CONFIG_FILE).get("train.train_rest")
    if train_rest is None:
        raise ConfigError(f"{run_dir / CONFIG_FILE}: has no train.train_rest, so it is not the config of a run")
    state = found.state
    if _missing(state["model"]):
        state = {**state, "model": state["model"] | read_base(run_dir)}
    return RunSource(found.path, state, train_rest.value)


def move_base(run_dir: str | Path, place: str | Path) -> None:
    """Record the new place of a run's base.

    Args:
        place: directory or weight file.

    Raises:
        ConfigError: the base is not a path, or there are other weights at `place`.
    """
    source, new = find_run(run_dir), str(Path(place).expanduser().absolute())
    stored = source.state["model"]
    schema = SCHEMA if is_vit(stored["name"]) else ""
    if _path(stored["pretrained"]) and not (_path(stored["name"]) and "name" in _missing(stored)):
        moved = stored | {"pretrained": new}
    elif _path(stored["name"]):
        moved = stored | {"name": f"{schema}local-dir:{new}"}
    else:
        raise ConfigError(f"--base: the base of {run_dir} is {stored['name']}, which is not a path")
    _start(replace(source, state={**source.state, "model": moved}), None)  # checks the digest
    write_base(Path(run_dir), moved["name"], moved["pretrained"])


def _path(name: str | None) -> Path | None:
    """model.name or model.pretrained as a path; None for an architecture, a tag or a hub entry."""
    plain = (name or "").removeprefix(SCHEMA)
    if plain.startswith("local-dir:"):
        return Path(plain.removeprefix("local-dir:"))
    return Path(plain) if Path(plain).is_absolute() else None


def _missing(stored: Mapping[str, Any]) -> dict[str, Path]:
    """{"name" or "pretrained": path} of the places of a base that do not exist."""
    paths = {key: _path(stored[key]) for key in ("name", "pretrained")}
    return {key: path for key, path in paths.items() if path is not None and not path.exists()}


def load_base(source: RunSource) -> Model:
    """The untouched model that the run started from; other weights under its name are a ConfigError.

    A ViT comes without the classifier, which the run adds.
    """
    return _start(source, None)


def _start(source: RunSource, classes: tuple[str, ...] | None) -> Model:
    stored = source.state["model"]
    for path in _missing(stored).values():
        raise ConfigError(
            f"{source.checkpoint}: its base {path} is not there; if it has moved, give its new place with --base PATH"
        )
    model = load_model(
        stored["name"], stored["pretrained"], seed=stored["seed"], classes=classes, image_size=stored.get("image_size")
    )
    check_base(model, source.base_digest, source.checkpoint)
    return model


def check_base(model: Model, digest: str, checkpoint: Path) -> None:
    """Raise ConfigError unless `model` has the weights of this digest, on which the checkpoint was trained."""
    if model.digest != digest:
        raise ConfigError(
            f"{checkpoint}: was trained on base weights {digest[:12]}, but model.name={model.name!r} with "
            f"model.pretrained={model.pretrained!r} gives {model.digest[:12]}: put the old weights back"
        )


class Both(NamedTuple):
    """The untouched model of a run, and the fine-tuned one, merged."""

    untouched: Model
    tuned: Model


def load_both(source: RunSource) -> Both:
    """`load_base` and `load_run`, with the base read once."""
    untouched = load_base(source)
    return Both(untouched, _merged(load_adapted(source, untouched)))


def load_run(run_dir: str | Path, step: int | None = None) -> Model:
    """The fine-tuned model of a run, merged into plain linears, in fp32 on the CPU and in eval mode.

    `digest` stays that of the base. The checkpoint must hold exactly the parameters that the run trains: missing or
    unknown names, wrong shapes and another base are ConfigErrors that name them.
    """
    return _merged(load_adapted(find_run(run_dir, step)))


def _merged(model: Model) -> Model:
    merge_adapter(model.model)
    model.model.requires_grad_(False).eval()
    return model


def load_adapted(source: RunSource, base: Model | None = None) -> Model:
    """Like `load_run`, with the blocks not merged into their linears.

    base: its untouched model, which is copied; None: read it.
    """
    classes = tuple(source.state["model"].get("classes") or ()) or None
    if base is None or classes:  # the classifier is part of the model that is built
        model = _start(source, classes)
    else:
        model = replace(base, model=copy.deepcopy(base.model))
    if isinstance(model, Clip) and source.state["model"].get("added_bias") is not None:
        model = with_logit_bias(model, source.state["model"]["added_bias"])
    adapter = source.state["adapter"]
    if adapter["kind"] in ("lora", "dora"):
        try:
            attach_adapter(
                adapter_targets(model.model),
                rank=adapter["rank"],
                kind=adapter["kind"],
                alpha=adapter["alpha"],
                gated=adapter["gated"],
                threshold=adapter["threshold"],
                select=adapter["targets"],
            )
        except ValueError as error:
            raise ConfigError(f"{source.checkpoint}: {error}") from error
    trained = apply_trainable(model.model, source.train_rest, adapter["kind"])
    copy_parameters(model, trained, source.checkpoint)
    model.model.requires_grad_(False).eval()
    return model


def copy_parameters(model: Model, names: list[str], checkpoint: Path) -> None:
    """Fill the named parameters from the checkpoint; if a name or a shape does not match, nothing is copied."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = checkpoint / "trainable.safetensors"
    try:
        saved = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    own = {name: parameter for name, parameter in model.model.named_parameters() if name in set(names)}
    faults = [f"missing {name}" for name in sorted(own.keys() - saved.keys())]
    faults += [f"unknown {name}" for name in sorted(saved.keys() - own.keys())]
    faults += [
        f"{name} has shape {tuple(saved[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(own.keys() & saved.keys())
        if own[name].shape != saved[name].shape
    ]
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ConfigError(f"{file} does not fit the model ({len(faults)} faults): {'; '.join(faults[:8])}{more}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
            # earlier versions trained and saved it beyond the bound of their loss
            if name == "logit_scale" and not has_bias(model.model):
                parameter.clamp_(max=math.log(MAX_LOGIT_SCALE))
