"""The parts of a run, built from its config and assembled for the loop (loop.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import Config, ConfigError
from pipeline.data.batches import Batches
from pipeline.data.reference.samples import Reference, ReferenceData
from pipeline.data.shards.index import ShardIndex
from pipeline.data.train.stream import Batch, TrainDataset, train_loader
from pipeline.method.adapter import GradientWatch
from pipeline.method.budget import BlockBudget
from pipeline.method.contrastive import MAX_LOGIT_SCALE, gather
from pipeline.method.settle import Settling
from pipeline.model.clip import Clip
from pipeline.model.load import Model
from pipeline.model.text import TooLong, batch_tokenizer
from pipeline.model.towers import inside_layers
from pipeline.model.vit import Vit
from pipeline.model.weights import has_bias
from pipeline.training.checkpoint import Checkpoint, Writer, save_checkpoint
from pipeline.training.cluster.distributed import World
from pipeline.training.cluster.lease import Lease
from pipeline.training.directory import say
from pipeline.training.engine import (
    build_engine,
    full_parameters,
    optimizer_state,
    pieces_of,
    rest,
    restore_moments,
)
from pipeline.training.loop import Inputs, Step, Training
from pipeline.training.model import (
    budget_of,
    checkpoint_state,
    gate_values,
    layer_classes,
    objective_of,
    score_rate,
    settling_of,
    targets_of,
    trainable,
)
from pipeline.training.monitor import Monitor, Sink, TrainingFailed
from pipeline.training.optim import Rates, lr_factor, parameter_groups
from pipeline.training.reference import encoding
from pipeline.training.settings import compiles

MOST_PAIRS = 2048  # pairs on which the initial logit bias is computed


@dataclass(frozen=True)
class TrainingJob:
    """The facts of a run that are known before anything is built.

    Attributes:
        total: optimizer steps of the whole run.
        control: gloo group for messages between ranks.
        lease: this job's claim on the run directory; None on ranks that do not write.
    """

    config: Config
    run_dir: Path
    world: World
    index: ShardIndex
    total: int
    control: dist.ProcessGroup
    lease: Lease | None


def build_training(
    job: TrainingJob, model: Model, reference: ReferenceData | None, checkpoint: Checkpoint | None, sink: Sink
) -> tuple[Training, Monitor]:
    """Assemble a run, at the step of `checkpoint` if there is one.

    `model` already holds the parameters of the checkpoint; the optimizer's moments and the state of the gates are
    restored here.

    Args:
        model: the model with its blocks.
        reference: reference samples that hold the model near the untouched one; None without section keep.

    Returns:
        The run for the loop, and the monitor among its hooks, which the caller closes after the loop.
    """
    config, net, settings = job.config, model.model, job.config.train
    budget = budget_of(config, model, job.total)
    rates = Rates(settings.lr, settings.rest_lr or settings.lr, score_rate(config))
    groups = parameter_groups(trainable(net), inside_layers, rates, settings.weight_decay)
    watch = GradientWatch(net)
    engine = _engine(job, model, groups)
    named, settling = trainable(net), settling_of(config, model)
    if checkpoint is not None:
        restore_moments(engine, named, checkpoint.moments())
        if settling is not None:
            settling.restore(checkpoint.state["settling"])
        if budget is not None:
            budget.restore(checkpoint.state["budget"])
            budget.shut_closed(checkpoint.step)
    held = None if reference is None else Reference(*(each.to(engine.device) for each in reference.held()))
    monitor = _monitor(
        job,
        sink,
        reference,
        partial(gate_values, net, settling),
        partial(_drift, engine, held),
        lambda: engine.skipped_steps,
    )
    writer = Writer()
    training = Training(
        engine=engine,
        batches=_batches(job, model, reference, 0 if checkpoint is None else checkpoint.step),
        inputs=partial(_inputs, config.train.positives == "class"),
        schedule=lambda step: lr_factor(step, settings.warmup_steps, job.total),
        after_step=[
            _gradient_check(watch),
            _cap_scale(engine, None if has_bias(net) else dict(named).get("logit_scale")),
            _settle(engine, model, settling),
            _spend(engine, config, budget),
            monitor.after_step,
            lambda _: writer.check(),
        ],
        save=partial(_save, job, model, engine, monitor, named, settling, budget, writer),
        close=writer.close,
        checkpoint_every=settings.checkpoint_every,
        total_steps=job.total,
        seed=config.seed,
        control=job.control,
    )
    return training, monitor


def _engine(job: TrainingJob, model: Model, groups: list[dict[str, Any]]) -> Any:
    """The objective inside DeepSpeed, with compiled layers if the run has them."""
    compiled, why = compiles(job.config, job.world.world_size, job.world.device.type)
    if why and job.world.device.type == "cuda":
        say(job.world, f"train.compile=auto: {'compiled' if compiled else 'eager'}, {why}")
    objective = objective_of(job.config, model, compiled)
    train = job.config.train.model_copy(update={"zero_stage": job.config.train.stage(job.world.world_size)})
    config = job.config.model_copy(update={"train": train})
    return build_engine(objective, groups, config, job.world, layer_classes(model) if compiled else [])


def _save(
    job: TrainingJob,
    model: Model,
    engine: Any,
    monitor: Monitor,
    named: Sequence[tuple[str, nn.Parameter]],
    settling: Settling | None,
    budget: BlockBudget | None,
    writer: Writer,
    done: int,
    last: bool,
) -> None:
    """Write the checkpoint after `done` steps; the last one of this job is on the disk on return. Collective.

    named: the parameters that trained at the start of the run, including blocks that have settled since.
    """
    monitor.check_finite()
    parameters, moments = full_parameters(named), optimizer_state(engine, named)
    _refuse_what_is_not_finite(parameters, done)
    if job.world.is_main:
        state = checkpoint_state(job.config, model, job.index.digest, done, job.world, settling, budget)
        writer.start(partial(_write, job, parameters, moments, state))
    if last:
        writer.wait()
        dist.barrier(job.control)


def _write(job: TrainingJob, parameters: dict[str, Tensor], moments: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint, unless another job has taken the run over meanwhile."""
    if job.lease is not None:
        job.lease.check()
    save_checkpoint(job.run_dir, parameters, moments, state, keep_last=job.config.train.keep_last)


def start_logit_bias(job: TrainingJob, model: Clip) -> float:
    """Initial logit bias for a model without one: the value with the least sigmoid loss on the first batch.

    At this value the probabilities of all pairs add up to the number of positives. From a distant start, such as the
    constant for training from scratch, the bias would have to move before the weights matter. Collective.
    """
    batch = next(iter(_batches(job, model, None, 0, stop=1, workers=0)))
    with encoding(model, job.world.device) as untouched:
        assert batch.tokens is not None, "of a CLIP"
        sides = untouched.images(batch.images), untouched.texts(batch.tokens)  # type: ignore[misc]
    images, texts = (torch.cat(gather(each, job.control))[:MOST_PAIRS].double() for each in sides)
    logits = model.model.get_parameter("logit_scale").detach().double().exp().cpu() * images @ texts.T
    # Of a larger batch only a part is used, whose negatives represent all.
    weights = torch.full_like(logits, (job.config.train.global_batch_size - 1) / max(1, len(logits) - 1))
    weights.fill_diagonal_(1)
    low, high = -float(logits.max()) - 50, -float(logits.min()) + 50
    for _ in range(60):
        middle = (low + high) / 2
        below = float((weights * (logits + middle).sigmoid()).sum()) < len(logits)
        low, high = (middle, high) if below else (low, middle)
    found = torch.tensor([low])
    dist.broadcast(found, 0, group=job.control)
    return round(float(found), 4)


def _refuse_what_is_not_finite(parameters: Mapping[str, Tensor], done: int) -> None:
    """Raise if a parameter is not finite, which can happen while the loss is finite. All ranks decide the same."""
    names = [name for name, value in parameters.items() if not value.isfinite().all()]
    if names:
        raise TrainingFailed(
            f"step {done - 1}: {len(names)} parameters are not finite after it ({names[0]}, ..); they are not saved, "
            "and the last checkpoint holds the state before. Lower train.lr, lengthen train.warmup_steps, set "
            "train.grad_clip or use model.precision=fp32"
        )


def _inputs(by_class: bool, batch: Batch) -> Inputs:
    reference = None if batch.reference is None else batch.reference.tensors
    return Inputs(batch.images, targets_of(batch), reference, batch.labels if by_class else None)


def _drift(engine: Any, held: Reference | None) -> dict[str, float]:
    """Distance to the untouched model on held-out reference samples. Collective."""
    if held is None:
        return {}
    with torch.no_grad():
        return {f"keep/{name}": float(value) for name, value in engine(None, None, 0, held).items()}


def _gradient_check(watch: GradientWatch) -> Callable[[Step], None]:
    """Check after the first step, when ZeRO-3 has gathered the scores again, that every block got a gradient."""
    pending = [watch]

    def check(_: Step) -> None:
        if not pending:
            return
        try:
            pending.pop().check()
        except ValueError as error:
            raise ConfigError(f"after the first backward pass {error}; take them out of adapter.targets") from error

    return check


def _cap_scale(engine: Any, scale: nn.Parameter | None) -> Callable[[Step], None]:
    """Keep the stored logit scale at or below ln 100 while it trains; the loss applies the same bound.

    None for a scale without this bound.
    """
    pieces = [] if scale is None else pieces_of(engine, scale)

    @torch.no_grad()
    def cap(_: Step) -> None:
        for piece in pieces:
            piece.clamp_(max=math.log(MAX_LOGIT_SCALE))

    return cap


def _settle(engine: Any, model: Model, settling: Settling | None) -> Callable[[Step], None]:
    """Shut the blocks whose gates settle with this step, and keep the optimizer from moving them."""

    def settle(_: Step) -> None:
        for block in settling.observe() if settling is not None else []:
            rest(engine, block.lowrank.parameters(), at_zero=True)
            rest(engine, block.undecayed(), at_zero=False)
        if not trainable(model.model):
            raise TrainingFailed(
                "every gate has settled and train.train_rest=none: nothing is left to train. "
                "Lower gate.lam, or set gate.settle_steps=null"
            )

    return settle


def _spend(engine: Any, config: Config, budget: BlockBudget | None) -> Callable[[Step], None]:
    """Open and close blocks according to the budget; once the set is fixed, closed blocks leave the computation."""

    @torch.no_grad()
    def spend(step: Step) -> None:
        if budget is None:
            return
        for name, opens in budget.observe(step.done, _mean_over_ranks).items():
            for piece in pieces_of(engine, budget.gate(name).score):
                piece.fill_(config.gate.init if opens else 0.0)
        for block in budget.shut_closed(step.done):
            rest(engine, block.lowrank.parameters(), at_zero=True)
            rest(engine, block.undecayed(), at_zero=False)

    return spend


def _mean_over_ranks(values: Tensor) -> Tensor:
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values / dist.get_world_size()


def _monitor(
    job: TrainingJob,
    sink: Sink,
    reference: ReferenceData | None,
    gates: Callable[[], dict[str, float]],
    drift: Callable[[], dict[str, float]],
    skipped_steps: Callable[[], int],
) -> Monitor:
    config, images = job.config, None if reference is None else reference.images
    samples = job.index.samples + (0 if images is None else images.index.samples)
    return Monitor(
        world=job.world,
        control=job.control,
        sink=sink,
        gates=gates,
        drift=drift,
        total_steps=job.total,
        global_batch_size=config.train.global_batch_size,
        peak_lr=config.train.lr,
        log_every=config.train.log_every,
        gates_every=config.train.gates_every,
        bad_limit=config.data.max_bad_share * samples,
        negatives=not config.classifies,
        skipped_steps=skipped_steps,
    )


def _batches(
    job: TrainingJob,
    model: Model,
    reference: ReferenceData | None,
    start: int,
    stop: int | None = None,
    workers: int | None = None,
) -> Batches[Batch]:
    """Batches of the steps from `start` to `stop`. None: the end of the run, and its number of workers."""
    config, data = job.config, job.config.data
    dataset = TrainDataset(
        job.index,
        size=model.preprocess_cfg["size"],
        seed=config.seed,
        streams=data.streams,
        window=data.shuffle_window,
        templates=data.templates,
        crop_scale=data.crop_scale,
        flip=data.flip,
        preprocessing=data.preprocessing,
        max_pixels=data.max_pixels,
    )
    return train_loader(
        dataset,
        global_batch=config.train.global_batch_size,
        start_step=start,
        stop_step=job.total if stop is None else stop,
        tokenizer=None if isinstance(model, Vit) else batch_tokenizer(model.model, model.tokenizer),
        find_cut=None if isinstance(model, Vit) else TooLong.of(model.tokenizer),
        reference=reference,
        rank=job.world.rank,
        world=job.world.world_size,
        sharing=job.world.local_world_size,
        workers=data.workers if workers is None else workers,
        ahead=data.read_ahead,
        pin=job.world.device.type == "cuda",
        # NCCL's threads are already running, and a process forked among them may hang.
        start_method="forkserver" if job.world.device.type == "cuda" else None,
    )
