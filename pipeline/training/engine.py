"""The only module that imports deepspeed: start the process group, wrap a model, read and write its full state."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import Config, ConfigError
from pipeline.training.cluster.cards import card_as_local_rank
from pipeline.training.cluster.distributed import TIMEOUT, World
from pipeline.training.device import on_host, portions

# Parameters up to this size stay whole under ZeRO-3: gathering the A and B of every block would cost hundreds of small
# collectives per step and save only a few megabytes.
PERSISTENT_ELEMENTS = 100_000
# Elements that ZeRO-3 keeps gathered, two layers of ViT-bigG/14. With DeepSpeed's 1e9 a rank would hold a ViT-L/14.
LIVE_ELEMENTS = 100_000_000
# Gradients are reduced in about this many buckets, so that communication starts during the backward. DeepSpeed
# allocates whole buckets: its default of 500 million elements takes 2 GB.
BUCKETS = 4
# State that an optimizer keeps for each parameter.
_MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}


def start_process_group(
    world: World, timeout: timedelta = TIMEOUT, store: dist.Store | None = None
) -> dist.ProcessGroup:
    """Join the process group (nccl on cards, gloo on CPU) and return a gloo group for control messages.

    timeout: of every collective. store: where the ranks met; None: a world of one, or a group that is there already.
    """
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if not dist.is_initialized():
        # A world of one needs no port, which another job could hold; DeepSpeed still requires a launcher's variables.
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        os.environ |= dict(zip(names, map(str, (world.rank, world.world_size, world.local_rank)), strict=True))
        dist.init_process_group(
            backend,
            store=store or dist.HashStore(),
            rank=world.rank,
            world_size=world.world_size,
            timeout=timeout,
            # NCCL then connects at once, to the card of this rank instead of guessing one.
            device_id=world.device if backend == "nccl" else None,
        )
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)  # only a rank outside the group would get something else
    return group


def deepspeed_config(config: Config, world: World, trained: int) -> dict[str, Any]:
    """The whole DeepSpeed configuration of a run.

    It does not set a precision: bf16 is autocast over fp32 parameters in the model's forward, so that scores, which
    move by 1e-5 per step, never pass through bf16.

    Args:
        trained: number of elements that train.

    Raises:
        ConfigError: the ranks cannot share the global batch.
    """
    if config.train.global_batch_size % world.world_size:
        raise ConfigError(
            f"train.global_batch_size: {config.train.global_batch_size} cannot be shared by {world.world_size} ranks"
        )
    stage, clip = config.train.zero_stage, config.train.grad_clip or 0.0
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": max(1, trained // BUCKETS),
        "overlap_comm": world.world_size > 1,
    }
    if stage in (1, 2):
        # The norm costs a kernel for each tensor and a wait for the device; only clipping reads it.
        zero["compute_grad_norm"] = clip > 0
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT_ELEMENTS
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = LIVE_ELEMENTS
    return {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.global_batch_size // world.world_size,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Always set: DeepSpeed (0.19.8) clips at 1.0 by default.
        "gradient_clipping": clip,
        "zero_optimization": zero,
        # DeepSpeed's timer waits for the device twice per step.
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 10**9,
    }


def build_engine(
    model: nn.Module, groups: list[dict], config: Config, world: World, whole: Sequence[type[nn.Module]] = ()
) -> Any:
    """Wrap `model` into a DeepSpeed engine that trains exactly the parameters of `groups`.

    whole: classes of modules whose parameters ZeRO-3 gathers all at once, before their forward.
    """
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    optimizer = _optimizer(
        [{key: value for key, value in group.items() if key != "names"} for group in groups],
        config,
        fused=world.device.type == "cuda",
    )
    settings = deepspeed_config(config, world, sum(each.numel() for group in groups for each in group["params"]))
    with _without_compiler_noise(), _without_mlflow():
        import deepspeed
        from deepspeed import ops

        # The shared-memory op serves inference only; building it takes a minute and leaks files in /dev/shm.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _import_muon_uncompiled()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if whole and config.train.zero_stage == 3:
            deepspeed.utils.set_z3_leaf_modules(model, list(whole))
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        with card_as_local_rank(world.device):
            if config.train.zero_stage == 3:  # initialize itself would first move the whole model to each device
                deepspeed.zero.Init(module=model, config_dict_or_path=settings)
                for buffer in model.buffers():  # Init moves parameters only
                    buffer.data = buffer.data.to(world.device)
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if world.world_size == 1 and config.train.zero_stage == 0:
        engine.enable_backward_allreduce = False  # it would copy every gradient twice, to sum it over one rank
    return engine


def _optimizer(groups: list[dict], config: Config, *, fused: bool) -> torch.optim.Optimizer:
    """fused: one kernel for all parameters of a group, on a GPU."""
    train = config.train
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=train.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=0.0, betas=train.betas, eps=train.eps, fused=fused)


def _moments(engine: Any) -> tuple[str, ...]:
    optimizer = engine.basic_optimizer
    # Without momentum SGD keeps no state, although it has an entry for it.
    plain = isinstance(optimizer, torch.optim.SGD) and not optimizer.defaults["momentum"]
    return () if plain else _MOMENTS[type(optimizer)]


@contextmanager
def _without_mlflow() -> Iterator[None]:
    """Hide mlflow from DeepSpeed's autotuner: importing it takes a fifth of a rank's start, and no rank uses it."""
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]


def _import_muon_uncompiled() -> None:
    """Import an unused optimizer without torch's compiler, which takes more than half of the CPU time of a start."""
    from deepspeed.runtime import compiler

    compiling = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compiling


@contextmanager
def _without_compiler_noise() -> Iterator[None]:
    """Silence the linker while DeepSpeed tries at its start which operators could be built."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def set_learning_rates(engine: Any, factor: float) -> None:
    """Give every parameter group its peak rate times `factor` for the coming step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def full_parameters(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Whole fp32 values of the given parameters on the CPU, under any ZeRO stage. Collective: all ranks call it.

    Below stage 3 every rank has them whole, and they are copied to the host in a few large transfers.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    found = dict(named)
    if not any(hasattr(parameter, "ds_tensor") for parameter in found.values()):
        return on_host({name: parameter.detach().float() for name, parameter in found.items()})
    state = {}
    for name, parameter in found.items():
        with _answering(parameter):
            value = safe_get_full_fp32_param(parameter)
        state[name] = (parameter if value is None else value).detach().to("cpu", torch.float32).clone()
    return state


@contextmanager
def _answering(parameter: nn.Parameter) -> Iterator[None]:
    """Make all parameters require a gradient in the block: ZeRO-3 silently ignores the state of others."""
    before = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        yield
    finally:
        parameter.requires_grad_(before)


def optimizer_state(engine: Any, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """The optimizer's moments of each parameter, whole, plus `step`; independent of ZeRO stage and world size.

    Collective: below stage 3 one all-reduce for some hundred MB, and one copy to the host.
    """
    _link_moments(engine)
    found, stage = dict(named), engine.zero_optimization_stage()
    state: dict[str, Tensor] = {}
    for moment in _moments(engine):
        if stage == 0:
            plain = engine.basic_optimizer.state
            whole = on_host({name: plain[parameter][moment] for name, parameter in found.items()})
        elif stage < 3:
            whole = _joined(found, moment)
        else:
            whole = _gathered(found, moment)
        state |= {f"{name}/{moment}": value for name, value in whole.items()}
    state["step"] = torch.tensor([_step_count(engine)])
    return state


def _joined(named: Mapping[str, nn.Parameter], moment: str) -> dict[str, Tensor]:
    """Whole moments under stages 1 and 2, where each rank has a fragment of some parameters. Collective."""
    found: dict[str, Tensor] = {}
    for names in portions({name: parameter.numel() for name, parameter in named.items()}):
        parameters: list[Any] = [named[name] for name in names]
        sizes = [parameter.numel() for parameter in parameters]
        flat = torch.zeros(sum(sizes), device=parameters[0].device)
        for parameter, part in zip(parameters, flat.split(sizes), strict=True):
            if (own := parameter._hp_mapping) is not None:
                where = own.lp_fragment_address
                part.narrow(0, where.start, where.numel).copy_(own.get_hp_fragment(moment))
        dist.all_reduce(flat, group=parameters[0]._dp_group)
        parts = flat.cpu().split(sizes)
        found |= {name: part.view(named[name].shape) for name, part in zip(names, parts, strict=True)}
    return found


def _gathered(named: Mapping[str, nn.Parameter], moment: str) -> dict[str, Tensor]:
    """Whole moments under stage 3, one parameter after another. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    found = {}
    for name, parameter in named.items():
        with _answering(parameter):
            value = safe_get_full_optimizer_state(parameter, moment)
        if value is None:
            raise RuntimeError(f"DeepSpeed holds no optimizer state for {name}")
        found[name] = value.detach().to("cpu").clone()
    return found


def restore_moments(engine: Any, named: Iterable[tuple[str, nn.Parameter]], moments: Mapping[str, Tensor]) -> None:
    """Write whole moments, as returned by `optimizer_state`, into an engine of any ZeRO stage and world size.

    The parameters themselves are loaded into the model before the engine is built, so its fp32 masters start from them.
    """
    _create_moments(engine, float(moments["step"].item()))
    for name, parameter in named:
        for moment in _moments(engine):
            _set_moment(engine, parameter, moment, moments[f"{name}/{moment}"].to(engine.device))


def rest(engine: Any, parameters: Iterable[nn.Parameter], *, at_zero: bool) -> None:
    """Keep the optimizer from moving parameters that no longer get a gradient, by clearing their momentum.

    at_zero: also set them to zero, so that weight decay does not move them either.
    """
    _link_moments(engine)
    for parameter in parameters:
        nothing = torch.zeros(_whole_shape(parameter), device=engine.device)
        with _answering(parameter):
            for moment in _moments(engine):
                _set_moment(engine, parameter, moment, nothing)
            if at_zero:
                _set_value(engine, parameter, nothing)


def pieces_of(engine: Any, parameter: Any) -> list[Tensor]:
    """Every tensor of this rank that holds a parameter or a part of it, to be changed in place between steps.

    These are the tensor that the model computes with, the partition that ZeRO-3 gathers from, and the fp32 master. If
    all ranks change their pieces alike, no collective is needed and the host does not wait.
    """
    master: Tensor | None = None
    stage = engine.zero_optimization_stage()
    if stage == 3:
        from deepspeed.utils import safe_get_local_fp32_param

        master = safe_get_local_fp32_param(parameter)
    elif stage > 0 and parameter._hp_mapping is not None:
        master = parameter._hp_mapping.get_hp_fragment()
    pieces = (parameter, getattr(parameter, "ds_tensor", None), master)
    return [piece for piece in pieces if piece is not None]


def _whole_shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _set_moment(engine: Any, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    stage = engine.zero_optimization_stage()
    if stage == 0:
        engine.basic_optimizer.state[parameter][moment].copy_(value)
    elif stage < 3:
        safe_set_full_optimizer_state(parameter, value, moment)
    else:
        # DeepSpeed's own setter slices past the end if the number of ranks does not divide the size.
        safe_set_local_optimizer_state(parameter, _partition(value, parameter), moment)


@torch.no_grad()
def _set_value(engine: Any, parameter: Any, value: Tensor) -> None:
    """Set the fp32 master and the model's own tensor; under ZeRO-3 the latter follows with the next step."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    stage = engine.zero_optimization_stage()
    if stage == 3:
        safe_set_local_fp32_param(parameter, _partition(value, parameter))
        return
    if stage > 0:
        safe_set_full_fp32_param(parameter, value)
    parameter.copy_(value)


def _partition(value: Tensor, parameter: Any) -> Tensor:
    """This rank's slice of `value`, zero-padded as ZeRO-3 pads its partitions."""
    size = parameter.ds_tensor.numel()
    padded = value.new_zeros(size * dist.get_world_size())
    padded[: value.numel()] = value.flatten()
    return padded.narrow(0, size * dist.get_rank(), size)


def _step_count(engine: Any) -> float:
    # Stage 0 stops counting steps for a parameter that no longer gets a gradient; its count is then meaningless.
    counts = (float(entry["step"]) for entry in engine.basic_optimizer.state.values() if "step" in entry)
    return max(counts, default=0.0)


def _create_moments(engine: Any, step: float) -> None:
    """Create the moments now: an optimizer creates them at its first step, and a restored engine needs them before."""
    optimizer, stage = engine.basic_optimizer, engine.zero_optimization_stage()
    # ZeRO-3 empties the optimizer's groups between steps and keeps the flat partitions itself.
    flat = engine.optimizer.fp32_partitioned_groups_flat if stage == 3 else None
    for parameter in flat or [p for group in optimizer.param_groups for p in group["params"]]:
        # A fused optimizer counts on the device.
        where = parameter.device if optimizer.defaults["fused"] else None
        optimizer.state[parameter] = {
            "step": torch.tensor(step, dtype=torch.float32, device=where),
            **{moment: torch.zeros_like(parameter) for moment in _moments(engine)},
        }
    _link_moments(engine)


def _link_moments(engine: Any) -> None:
    """Link each parameter to its slice of the moments (stages 1 and 2).

    DeepSpeed does this only once, after the first group's first step, before the other groups have moments.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
