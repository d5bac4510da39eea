"""The sections of the config: every option once, with its type, range, default, unit and effect (effects.py)."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipeline.config.effects import Measurement, Place, Promotion, Record, Result, Speed

Tower = Literal["image", "text", "pool"]
Projection = Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
_FromList = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Towers = Annotated[tuple[Tower, ...], _FromList]
Projections = Annotated[tuple[Projection, ...], _FromList]
Texts = Annotated[tuple[str, ...], _FromList]
Pair = Annotated[tuple[float, float], _FromList]
_FLOOR = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*>=\s*(\d+(?:\.\d*)?|\.\d+)\s*")


class Section(BaseModel):
    """Strict: bools are not numbers, "4" is not a count, inf and nan are refused, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(Section):
    """The pretrained model."""

    name: Result[str] = Field(
        default="ViT-B-16-quickgelu",
        min_length=1,
        description="open_clip architecture, local-dir:PATH or hf-hub:ORG/NAME of a CLIP, or hf:ORG/NAME in the layout "
        "of transformers; with the prefix timm: a ViT, which is trained as a classifier",
    )
    pretrained: Result[str | None] = Field(
        default=None,
        description="open_clip tag such as openai, or a weights file; null: the weights that come with the name, or "
        "random ones",
    )
    image_size: Result[int | None] = Field(
        default=None,
        ge=1,
        description="side of the images in pixels; the image tower's position embeddings are resized to it; null: the "
        "model's own",
    )
    precision: Result[Literal["fp32", "bf16"]] = Field(
        default="fp32", description="precision of the frozen weights and activations"
    )


class Adapter(Section):
    """The blocks: their form, rank and places."""

    kind: Result[Literal["full", "none", "lora", "dora"]] = Field(
        default="lora",
        description="form of the blocks; full: no blocks, every weight trains (FLYP); none: no blocks, only "
        "train.train_rest trains",
    )
    rank: Result[int] = Field(default=16, ge=1, description="rank of each block")
    alpha: Result[float | None] = Field(
        default=None, gt=0, description="blocks are scaled by alpha / rank; null: scale 1"
    )
    towers: Result[Towers] = Field(
        default=("image", "text"),
        min_length=1,
        description="towers that carry blocks; pool: the attention pooling behind the image tower of SigLIP",
    )
    projections: Result[Projections] = Field(
        default=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        min_length=1,
        description="linears that carry blocks",
    )
    targets: Result[Texts | None] = Field(
        default=None,
        min_length=1,
        description="glob patterns over target names such as image.3.q_proj, instead of towers and projections",
    )
    random_k: Result[int | None] = Field(
        default=None, ge=1, description="baseline: this number of blocks without gates, drawn by seed"
    )


class Gate(Section):
    """The gates of the blocks and the penalty that closes them."""

    enabled: Result[bool] = Field(
        default=True, description="give each block a learned gate; ignored with random_k, full and none"
    )
    threshold: Result[float] = Field(default=0.1, ge=0, description="tau: a gate is open where its score >= tau")
    init: Result[float] = Field(default=0.15, ge=0, description="score of every gate before training")
    penalty: Result[Literal["l1", "l2", "hinge"]] = Field(
        default="l1", description="form of the sparsity penalty on the scores"
    )
    reduction: Result[Literal["mean", "sum"]] = Field(
        default="mean", description="how the penalty combines the scores; sum is equation 4 of the paper to the letter"
    )
    lam: Result[float] = Field(default=1.0, ge=0, description="λ, the weight of the penalty")
    delay_steps: Result[int] = Field(default=0, ge=0, description="optimizer steps before the penalty starts")
    lr: Result[float | None] = Field(default=None, gt=0, description="learning rate of the scores; null: train.lr")
    settle_steps: Result[int | None] = Field(
        default=None,
        ge=1,
        description="number of consecutive steps after which a closed gate is closed for good and its block leaves the "
        "computation; null: never",
    )
    settle_margin: Result[float] = Field(
        default=0.02, ge=0, description="how far below the threshold a score must be to count for gate.settle_steps"
    )
    budget: Result[float | None] = Field(
        default=None,
        gt=0,
        description="exact number of blocks that are active at the end, or a share of all below 1, chosen by how much "
        "each lowers the loss; needs gate.lam=0; null: the penalty decides",
    )
    budget_parameters: Result[int | None] = Field(
        default=None,
        ge=1,
        description="largest number of parameters of the blocks that are active at the end, instead of gate.budget; "
        "chosen by how much each parameter lowers the loss",
    )

    @property
    def budgeted(self) -> bool:
        """Whether a budget decides which blocks close, and not the penalty."""
        return self.budget is not None or self.budget_parameters is not None


class Train(Section):
    """Optimizer, schedule, batch and checkpoints."""

    train_rest: Result[Literal["all", "proj_ln", "none"]] = Field(
        default="all",
        description="what trains outside the transformer layers; proj_ln: the projections and the outer layer norms",
    )
    loss: Result[Literal["auto", "contrastive", "sigmoid"]] = Field(
        default="auto",
        description="contrastive: softmax over the batch (CLIP, FLYP); sigmoid: each pair on its own (SigLIP); auto: "
        "sigmoid for a model with a logit bias, which SigLIP has, otherwise contrastive",
    )
    positives: Result[Literal["own", "class"]] = Field(
        default="own",
        description="captions that count as positives of an image; own: its own (FLYP); class: those of its "
        "class in the batch",
    )
    lr: Result[float] = Field(default=1e-5, gt=0, description="peak learning rate")
    rest_lr: Result[float | None] = Field(
        default=None, gt=0, description="peak learning rate of the weights that train_rest adds; null: train.lr"
    )
    optimizer: Result[Literal["adamw", "sgd"]] = Field(default="adamw", description="adamw, or sgd with train.momentum")
    momentum: Result[float] = Field(default=0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: Result[float] = Field(
        default=0.1, ge=0, description="weight decay; never applied to scores, magnitudes, the logit scale and its bias"
    )
    betas: Result[Pair] = Field(default=(0.9, 0.999), description="decay rates of AdamW's two moments")
    eps: Result[float] = Field(default=1e-8, gt=0, description="AdamW's epsilon")
    warmup_steps: Result[int] = Field(
        default=500, ge=0, description="optimizer steps of linear warm-up, followed by cosine decay to 0"
    )
    epochs: Result[float] = Field(default=10.0, gt=0, description="passes over the images")
    steps: Result[int | None] = Field(default=None, ge=1, description="optimizer steps, instead of epochs")
    global_batch_size: Result[int] = Field(default=512, ge=2, description="images per optimizer step, over all ranks")
    micro_batch_size: Speed[int | None] = Field(
        default=None,
        ge=1,
        description="images that a rank passes through the towers at a time: less memory, one more forward pass, the "
        "same gradient; null: all images of the step",
    )
    activation_checkpointing: Speed[bool] = Field(
        default=False,
        description="recompute the activations of each layer in the backward pass instead of storing them",
    )
    device: Speed[Literal["auto", "cuda", "cpu"]] = Field(
        default="auto", description="auto: a GPU where there is one; a host whose GPUs cannot be used is an error"
    )
    compile: Speed[Literal["auto"] | bool] = Field(
        default="auto",
        description="compile each layer with torch.compile; auto: on a GPU with fewer than 256 images per rank",
    )
    grad_clip: Result[float | None] = Field(
        default=None, gt=0, description="clip the gradient to this norm; null: no clipping"
    )
    zero_stage: Speed[int] = Field(
        default=1, ge=0, le=3, description="DeepSpeed ZeRO stage; one rank runs 1 and 2 as 0"
    )
    log_every: Record[int] = Field(default=10, ge=1, description="steps between log records of losses and speed")
    gates_every: Record[int] = Field(default=50, ge=1, description="steps between log records of every gate")
    checkpoint_every: Record[int] = Field(
        default=500, ge=1, description="steps between checkpoints; the last step always writes one"
    )
    keep_last: Record[int] = Field(default=2, ge=1, description="number of checkpoints to keep on disk")
    timeout_s: Speed[float] = Field(
        default=1800.0, gt=0, description="seconds that ranks wait for each other, at the start and in collectives"
    )

    def stage(self, ranks: int) -> int:
        """The ZeRO stage in effect: 1 and 2 share gradients and moments among ranks, so one rank alone has stage 0.

        DeepSpeed's work on each gradient would remain (docs/gpu.md). Stage 3 also frees layers that are not in use.
        """
        return 0 if ranks == 1 and self.zero_stage < 3 else self.zero_stage


class Keep(Section):
    """Reference data on which the model is held near the untouched one."""

    weight: Result[float] = Field(
        default=0.0,
        ge=0,
        description="weight of the distance to the untouched model on reference samples; 0: off, as in the paper",
    )
    texts: Result[str | None] = Field(
        default="general",
        min_length=1,
        description="reference texts: general (a list that ships with selora) or a UTF-8 file with one sentence per "
        "line; null: captions only",
    )
    images: Result[str | None] = Field(
        default=None,
        min_length=1,
        description="directory or URL of shards with reference images (made by selora pack), whose captions are used "
        "where there are some; null: none",
    )
    batch_size: Result[int] = Field(
        default=16,
        ge=1,
        description="reference images, and as many reference texts, of one optimizer step over all ranks",
    )
    replay: Result[float] = Field(
        default=0.0,
        ge=0,
        description="weight of the contrastive loss on reference images and their captions; it helps where the "
        "untouched model knows such pairs and harms where it does not; 0: off",
    )
    allow_overlap: Measurement[bool] = Field(
        default=False, description="accept reference images that are also in an evaluation set"
    )


class Data(Section):
    """Training shards, their order, captions and crops."""

    train: Result[str] = Field(min_length=1, description="directory or URL of training shards, written by selora pack")
    streams: Result[int] = Field(
        default=64, ge=1, description="number of equal parts of an epoch; the number of ranks must divide it"
    )
    shuffle_window: Result[int] = Field(
        default=2048, ge=1, description="number of samples within which a stream is shuffled"
    )
    workers: Speed[int] = Field(
        default=2, ge=0, description="decoding processes per rank; 0: decode in the training process"
    )
    read_ahead: Speed[int] = Field(
        default=2,
        ge=0,
        description="number of shards behind a URL to fetch before they are needed, per stream and within "
        "SELORA_CACHE_GB; 0: none",
    )
    templates: Result[str | Texts] = Field(
        default="openai",
        min_length=1,
        description="name of a set of caption templates, or a list of sentences with {c} for the class name",
    )
    crop_scale: Result[Pair] = Field(
        default=(0.9, 1.0), description="smallest and largest share of the image area that the random crop keeps"
    )
    flip: Result[bool] = Field(default=False, description="mirror a random half of the images")
    preprocessing: Result[Literal["fast", "reference"]] = Field(
        default="fast", description="fast: torchvision; reference: PIL, for published numbers"
    )
    max_bad_share: Speed[float] = Field(
        default=0.001, ge=0, le=1, description="stop the run when a larger share of the images is unreadable"
    )
    max_pixels: Result[int] = Field(default=2**28, ge=1, description="images with more pixels count as unreadable")


class Eval(Section):
    """Evaluation during a sweep, and the defaults of selora evaluate."""

    benchmark: Measurement[str | None] = Field(
        default=None, description="paper, quick, wds, vision or a YAML file; null: no evaluation"
    )
    root: Place[str | None] = Field(
        default=None,
        min_length=1,
        description="directory or URL of the benchmark's datasets; null: the root in the benchmark's file",
    )
    datasets: Measurement[Texts | None] = Field(
        default=None, min_length=1, description="keys of the datasets to evaluate; null: all of the benchmark"
    )
    batch_size: Speed[int | None] = Field(
        default=None, ge=1, description="images per rank and forward pass; null: 64, on a GPU 512"
    )
    workers: Speed[int | None] = Field(
        default=None, ge=0, description="decoding processes per rank; null: 2, on a GPU up to 12 of its share of cores"
    )
    preprocessing: Measurement[Literal["fast", "reference"]] = Field(
        default="reference",
        description="preprocessing in the evaluations of a sweep; reference: PIL, for published numbers",
    )
    precision: Measurement[Literal["fp32", "bf16"]] = Field(
        default="fp32", description="precision of the activations in evaluations; weights and features stay fp32"
    )
    cache: Place[str | None] = Field(
        default=None,
        min_length=1,
        description="directory that keeps decoded images for the next model; null: SELORA_CACHE; off: none",
    )


class Tracking(Section):
    """MLflow, and what is recorded."""

    uri: Record[str | None] = Field(
        default=None, min_length=1, description="MLflow tracking server or database; null: sqlite:///OUT/mlflow.db"
    )
    experiment: Record[str] = Field(default="selora", min_length=1, description="name of the MLflow experiment")
    enabled: Record[bool] = Field(
        default=True, description="send the journal to MLflow; the journal is written in any case"
    )
    machine_every_s: Record[float | None] = Field(
        default=None, gt=0, description="seconds between samples of CPU, memory and GPU use on every node; null: none"
    )


class Promote(Section):
    """What a run must reach to enter the registry. Accuracies and changes are shares: 0.02 is 2 points."""

    min_id: Promotion[float | None] = Field(
        default=None, ge=0, le=1, description="required mean accuracy of the group id"
    )
    min_gain: Promotion[float | None] = Field(
        default=None,
        ge=-1,
        le=1,
        description="required gain of the id mean over the untouched model; for a ViT's classifier, over guessing",
    )
    max_forgetting: Promotion[float | None] = Field(
        default=None, ge=-1, le=1, description="largest allowed mean drop over the groups other than id"
    )
    min_kept: Promotion[float | None] = Field(
        default=None,
        ge=0,
        le=1,
        description="required share of what the untouched model could do: mean over the datasets other than id of "
        "min(1, after / before)",
    )
    max_drop: Promotion[float | None] = Field(
        default=None,
        ge=-1,
        le=1,
        description="largest allowed drop of any dataset, compared with the same model as min_gain",
    )
    min_dataset: Promotion[Texts | None] = Field(
        default=None, min_length=1, description="required results of single datasets, for example ['pets >= 0.85']"
    )
    champion: Promotion[Literal["by_hand", "if_better", "always"]] = Field(
        default="by_hand",
        description="when a version becomes champion; if_better: if as good in id and kept, and better in one",
    )

    def floors(self) -> dict[str, float]:
        """{dataset: required result} of min_dataset; ValueError for an entry other than `KEY >= SHARE`."""
        floors = {}
        for entry in self.min_dataset or ():
            found = _FLOOR.fullmatch(entry)
            if found is None or float(found[2]) > 1:
                raise ValueError(f"promote.min_dataset: {entry!r} should be KEY >= SHARE, as in pets >= 0.85")
            floors[found[1]] = float(found[2])
        return floors
