"""The sections of the config: every option once, with its type, range, default, unit and effect (effects.py)."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipeline.config.effects import Measurement, Place, Promotion, Record, Result, Speed

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
    name: Result[str] = Field(
        default="ViT-B-16-quickgelu",
        min_length=1,
        description="open_clip name, local-dir:PATH or hf-hub:ORG/NAME of a CLIP; after timm: the same of a ViT, which "
        "is trained as a classifier",
    )
    pretrained: Result[str | None] = Field(
        default=None, description="open_clip tag (openai) or weights file; null: as the name says, or random"
    )
    precision: Result[Literal["fp32", "bf16"]] = Field(
        default="fp32", description="precision of the frozen weights and activations"
    )


class Adapter(Section):
    kind: Result[Literal["full", "none", "lora", "dora"]] = Field(
        default="lora", description="full: every weight trains (FLYP); none: no block, only train_rest"
    )
    rank: Result[int] = Field(default=16, ge=1, description="rank of each block")
    alpha: Result[float | None] = Field(
        default=None, gt=0, description="a block is scaled by alpha / rank; null: scale 1"
    )
    towers: Result[Towers] = Field(default=("image", "text"), min_length=1, description="towers that carry blocks")
    projections: Result[Projections] = Field(
        default=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        min_length=1,
        description="linears that carry blocks",
    )
    targets: Result[Texts | None] = Field(
        default=None,
        min_length=1,
        description="globs over target names (image.3.q_proj), instead of towers and projections",
    )
    random_k: Result[int | None] = Field(
        default=None, ge=1, description="baseline: this many blocks drawn by seed, always on, no gate"
    )


class Gate(Section):
    enabled: Result[bool] = Field(
        default=True, description="each block carries a learned gate (never for random_k, full, none)"
    )
    threshold: Result[float] = Field(default=0.1, ge=0, description="tau: a gate is open where its score >= tau")
    init: Result[float] = Field(default=0.15, ge=0, description="score of every gate before training")
    penalty: Result[Literal["l1", "l2", "hinge"]] = Field(
        default="l1", description="form of the sparsity penalty on the scores"
    )
    reduction: Result[Literal["mean", "sum"]] = Field(
        default="mean", description="over the scores; sum is the paper's eq. 4 to the letter"
    )
    lam: Result[float] = Field(default=1.0, ge=0, description="lambda, weight of the penalty")
    delay_steps: Result[int] = Field(default=0, ge=0, description="optimizer steps before the penalty sets in")
    lr: Result[float | None] = Field(default=None, gt=0, description="learning rate of the scores; null: train.lr")
    settle_steps: Result[int | None] = Field(
        default=None,
        ge=1,
        description="steps in a row that a gate stays closed before its block is shut for good and leaves the "
        "computation; null: never",
    )
    settle_margin: Result[float] = Field(
        default=0.02, ge=0, description="how far below the threshold a score must lie for gate.settle_steps to count it"
    )


class Train(Section):
    train_rest: Result[Literal["all", "proj_ln", "none"]] = Field(
        default="all", description="what trains outside the transformer layers; proj_ln: projections and outer norms"
    )
    lr: Result[float] = Field(default=1e-5, gt=0, description="peak learning rate")
    rest_lr: Result[float | None] = Field(default=None, gt=0, description="peak learning rate of train_rest; null: lr")
    optimizer: Result[Literal["adamw", "sgd"]] = Field(default="adamw", description="AdamW, or SGD with train.momentum")
    momentum: Result[float] = Field(default=0.9, ge=0, lt=1, description="of SGD")
    weight_decay: Result[float] = Field(default=0.1, ge=0, description="never on scores, magnitudes, logit scale")
    betas: Result[Pair] = Field(default=(0.9, 0.999), description="AdamW betas")
    eps: Result[float] = Field(default=1e-8, gt=0, description="AdamW eps")
    warmup_steps: Result[int] = Field(
        default=500, ge=0, description="optimizer steps of linear warmup, then cosine to 0"
    )
    epochs: Result[float] = Field(default=10.0, gt=0, description="passes over the images")
    steps: Result[int | None] = Field(default=None, ge=1, description="optimizer steps, instead of epochs")
    global_batch_size: Result[int] = Field(default=512, ge=2, description="images of one optimizer step over all ranks")
    micro_batch_size: Speed[int | None] = Field(
        default=None,
        ge=1,
        description="images of a rank that go through the towers at a time: less memory, one more forward, the same "
        "gradient; null: all its images of the step",
    )
    activation_checkpointing: Speed[bool] = Field(
        default=False, description="compute the inside of each layer again in the backward instead of keeping it"
    )
    compile: Speed[bool] = Field(default=False, description="torch.compile each layer")
    grad_clip: Result[float | None] = Field(
        default=None, gt=0, description="largest norm of the gradient; null: no clipping"
    )
    zero_stage: Speed[int] = Field(default=1, ge=0, le=3, description="DeepSpeed ZeRO stage")
    log_every: Record[int] = Field(default=10, ge=1, description="steps between records of losses and speed")
    gates_every: Record[int] = Field(default=50, ge=1, description="steps between records of every gate")
    checkpoint_every: Record[int] = Field(
        default=500, ge=1, description="steps between checkpoints; the last step always has one"
    )
    keep_last: Record[int] = Field(default=2, ge=1, description="checkpoints kept on disk")
    timeout_s: Speed[float] = Field(
        default=1800.0, gt=0, description="seconds that ranks wait for each other, at the start and in any collective"
    )


class Data(Section):
    train: Result[str] = Field(min_length=1, description="directory or URL of training shards (made by selora pack)")
    streams: Result[int] = Field(default=64, ge=1, description="equal parts of an epoch; ranks must divide it")
    shuffle_window: Result[int] = Field(default=2048, ge=1, description="samples among which a stream is shuffled")
    workers: Speed[int] = Field(default=2, ge=0, description="decoding processes per rank; 0: in the training process")
    read_ahead: Speed[int] = Field(
        default=2,
        ge=0,
        description="shards behind a URL fetched before they are needed, per stream and as far as SELORA_CACHE_GB has "
        "room; 0: none",
    )
    templates: Result[str | Texts] = Field(
        default="openai", min_length=1, description="name of a caption template set, or a list with {c}"
    )
    crop_scale: Result[Pair] = Field(
        default=(0.9, 1.0), description="share of the image area kept by the random crop, low and high"
    )
    flip: Result[bool] = Field(default=False, description="mirror every other image from left to right, at random")
    preprocessing: Result[Literal["fast", "reference"]] = Field(
        default="fast", description="reference: PIL, for published numbers"
    )
    max_bad_share: Speed[float] = Field(
        default=0.001, ge=0, le=1, description="share of unreadable images that stops the run"
    )
    max_pixels: Result[int] = Field(default=2**28, ge=1, description="an image with more pixels counts as unreadable")


class Eval(Section):
    benchmark: Measurement[str | None] = Field(
        default=None, description="evaluation datasets: paper, quick, wds, or a YAML file; null: no evaluation"
    )
    root: Place[str | None] = Field(
        default=None, min_length=1, description="where the benchmark's datasets lie; null: as its file says"
    )
    datasets: Measurement[Texts | None] = Field(
        default=None, min_length=1, description="only these rows of the benchmark, by their keys; null: all"
    )
    batch_size: Speed[int] = Field(default=64, ge=1, description="images per rank and forward")
    workers: Speed[int] = Field(default=2, ge=0, description="decoding processes per rank")
    preprocessing: Measurement[Literal["fast", "reference"]] = Field(
        default="reference", description="of a sweep's evaluations; reference: PIL, for published numbers"
    )
    cache: Place[str | None] = Field(
        default=None,
        min_length=1,
        description="directory where decoded images are kept for the next model; null: SELORA_CACHE; off: nowhere",
    )


class Tracking(Section):
    uri: Record[str | None] = Field(
        default=None, min_length=1, description="MLflow tracking server; null: sqlite:///OUT/mlflow.db"
    )
    experiment: Record[str] = Field(default="selora", min_length=1, description="MLflow experiment")
    enabled: Record[bool] = Field(
        default=True, description="send the journal to MLflow; the journal itself is always written"
    )
    machine_every_s: Record[float | None] = Field(
        default=None, gt=0, description="seconds between samples of every node's CPU, memory and GPUs; null: none"
    )


class Promote(Section):
    """What a run must reach before it enters the registry; accuracies and their changes are shares, 0.02 = 2 points."""

    min_id: Promotion[float | None] = Field(
        default=None, ge=0, le=1, description="smallest mean accuracy of the id group"
    )
    min_gain: Promotion[float | None] = Field(
        default=None,
        ge=-1,
        le=1,
        description="smallest rise of the id mean over the untouched model, of a ViT's own classifier over guessing",
    )
    max_forgetting: Promotion[float | None] = Field(
        default=None, ge=-1, le=1, description="largest mean drop over the groups other than id"
    )
    min_kept: Promotion[float | None] = Field(
        default=None,
        ge=0,
        le=1,
        description="smallest share kept of what the untouched model could do: mean over the datasets other than id of "
        "min(1, after / before)",
    )
    max_drop: Promotion[float | None] = Field(
        default=None, ge=-1, le=1, description="largest drop of any one dataset, against the same as min_gain"
    )
    min_dataset: Promotion[Texts | None] = Field(
        default=None, min_length=1, description="smallest result of single datasets, as in ['pets >= 0.85']"
    )
    champion: Promotion[Literal["by_hand", "if_better", "always"]] = Field(
        default="by_hand",
        description="when a version becomes champion; if_better: no worse than it in id and kept, better in one",
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
